"""Writes spm_cases.json: what SentencePiece itself makes of vocab_test.inp, for each model given.

    python make_spm_cases.py NAME=FILE ...
"""
import json, pathlib, sys, sentencepiece

here = pathlib.Path(__file__).parent
texts = (here / "vocab_test.inp").read_text(encoding="utf-8").split("\n__ggml_vocab_test__\n")[:-1]
texts += ["Once upon a time, there was a little girl named Lily.", "a  b   c ", "▁x", "naïve café 日本", "ﬁ ½ Å①㍿"]
models = {}
for argument in sys.argv[1:]:
    name, file = argument.split("=", 1)
    processor = sentencepiece.SentencePieceProcessor(model_file=file)
    models[name] = [{"text": t, "ids": processor.encode(t), "decoded": processor.decode(processor.encode(t))} for t in texts]
lines = [json.dumps(n) + ": [\n" + ",\n".join(json.dumps(c, ensure_ascii=False) for c in cases) + "]" for n, cases in models.items()]
text = '{"sentencepiece": "%s",\n' % sentencepiece.__version__ + ",\n".join(lines) + "}\n"
(here / "spm_cases.json").write_text(text, encoding="utf-8")

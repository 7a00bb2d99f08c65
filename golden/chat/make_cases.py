"""Renders the templates in templates/ with transformers and writes cases.json: what this project must render, letter for letter.

    pip install transformers==5.23.0 jinja2==3.1.6 && python make_cases.py

The templates were written for this repository. Each uses what templates in circulation use: tools as JSON, thinking, named blocks,
macros, namespaces, loop controls, Python's string methods, printed Python values, generation marks, complaints.
"""

import json
from pathlib import Path

from transformers.utils.chat_template_utils import _compile_jinja_template

HERE = Path(__file__).parent
USER = {"role": "user", "content": " What's 1 < 2 & \"so\"?\n"}
ANSWER = {"role": "assistant", "content": "Ja, größer. "}
THOUGHT = {"role": "assistant", "content": "<think>\nHm.\n</think>\n\nYes."}
SYSTEM = {"role": "system", "content": "Be brief."}
TOOL = {"type": "function", "function": {"name": "find", "description": "Finds é <b>", "parameters": {
    "type": "object", "properties": {"q": {"type": "string"}, "n": {"type": "integer", "default": None}}, "required": []}}}
CALL = {"role": "assistant", "content": "", "tool_calls": [{"type": "function", "function": {"name": "find", "arguments": {"q": "x", "deep": True}}}]}
RESULT = {"role": "tool", "content": "found"}

CONTEXTS = [
    {"messages": [USER]},
    {"messages": [SYSTEM, USER, ANSWER, USER]},
    {"messages": [SYSTEM, USER, THOUGHT, USER], "enable_thinking": False},
    {"messages": [USER, THOUGHT, USER], "enable_thinking": True, "add_generation_prompt": False},
    {"messages": [SYSTEM, USER, CALL, RESULT, RESULT], "tools": [TOOL]},
    {"messages": [ANSWER]},
]

cases = []
for path in sorted(HERE.glob("templates/*.jinja")):
    template = _compile_jinja_template(path.read_text())
    for context in CONTEXTS:
        context = {"add_generation_prompt": True, "bos_token": "<s>", "eos_token": "</s>", **context}
        try:
            outcome = {"rendered": template.render(**context)}
        except Exception as error:  # The template's own complaint, or Jinja's.
            outcome = {"error": type(error).__name__, "message": str(error)}
        cases.append({"template": path.name, "context": context, **outcome})
(HERE / "cases.json").write_text(json.dumps(cases, indent=1, ensure_ascii=False) + "\n")

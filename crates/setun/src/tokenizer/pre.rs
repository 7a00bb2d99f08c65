//! The split rules that GGUF names in `tokenizer.ggml.pre`.
//!
//! The patterns are those published in the models' own `tokenizer.json`; where llama.cpp applies several
//! in turn, so does this table. A text is cut by the first, every part by the second, and so on.

/// One family of byte-level BPE vocabularies.
#[derive(Debug)]
pub(super) struct Pre {
    /// Values of `tokenizer.ggml.pre`; the first is written.
    pub(super) names: &'static [&'static str],
    pub(super) patterns: &'static [&'static str],
    /// Words found whole in the vocabulary skip merging.
    pub(super) ignore_merges: bool,
    /// BOS is added when the file does not say.
    pub(super) add_bos: bool,
    /// The model's own tokenizer composes characters first (Unicode NFC).
    pub(super) nfc: bool,
}

const LLAMA3: &str = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+";
const QWEN2: &str = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+";
const QWEN35: &str = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?[\p{L}\p{M}]+|\p{N}| ?[^\s\p{L}\p{M}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+";
/// GPT-2's rule, which the `ByteLevel` pre-tokenizer of `tokenizer.json` applies by itself.
pub(super) const GPT2: &str = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+";
const TEKKEN: &str = r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]*[\p{Ll}\p{Lm}\p{Lo}\p{M}]+|[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]+[\p{Ll}\p{Lm}\p{Lo}\p{M}]*|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+";
const GPT4O: &str = r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]*[\p{Ll}\p{Lm}\p{Lo}\p{M}]+(?i:'s|'t|'re|'ve|'m|'ll|'d)?|[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]+[\p{Ll}\p{Lm}\p{Lo}\p{M}]*(?i:'s|'t|'re|'ve|'m|'ll|'d)?|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+";

static TABLE: &[Pre] = &[
    Pre {
        names: &["llama-bpe", "llama3", "llama-v3", "falcon3", "falcon-h1", "falcon_e", "falcon-e"],
        patterns: &[LLAMA3],
        ignore_merges: true,
        add_bos: true,
        nfc: false,
    },
    Pre {
        names: &["smaug-bpe", "dbrx"],
        patterns: &[LLAMA3],
        ignore_merges: false,
        add_bos: false,
        nfc: false,
    },
    Pre {
        names: &["gpt-2", "phi-2", "mpt", "olmo", "roberta-bpe"],
        patterns: &[GPT2],
        ignore_merges: false,
        add_bos: false,
        nfc: false,
    },
    Pre {
        names: &["qwen2", "deepseek-r1-qwen"],
        patterns: &[QWEN2],
        ignore_merges: false,
        add_bos: false,
        nfc: true,
    },
    Pre { names: &["stablelm2"], patterns: &[QWEN2], ignore_merges: false, add_bos: false, nfc: false },
    Pre { names: &["qwen35"], patterns: &[QWEN35], ignore_merges: false, add_bos: false, nfc: true },
    Pre {
        names: &["falcon"],
        patterns: &[r"[\p{P}\$\+<=>\^~\|`]+", GPT2, r"[0-9][0-9][0-9]"],
        ignore_merges: false,
        add_bos: false,
        nfc: false,
    },
    Pre {
        names: &["smollm", "starcoder", "refact", "command-r", "codeshell"],
        patterns: &[r"\p{N}", GPT2],
        ignore_merges: false,
        add_bos: false,
        nfc: false,
    },
    Pre { names: &["tekken"], patterns: &[TEKKEN], ignore_merges: true, add_bos: true, nfc: false },
    Pre { names: &["gpt-4o"], patterns: &[GPT4O], ignore_merges: false, add_bos: false, nfc: false },
    Pre {
        names: &["default"],
        patterns: &[r"[\p{P}\$\+<=>\^~\|]+", GPT2, r"\p{N}+", r"[0-9][0-9][0-9]"],
        ignore_merges: false,
        add_bos: false,
        nfc: false,
    },
];

impl Pre {
    pub(super) fn named(name: &str) -> Option<&'static Self> {
        TABLE.iter().find(|pre| pre.names.contains(&name))
    }

    /// The family with these rules, for writing.
    pub(super) fn with_rules(patterns: &[String], ignore_merges: bool, nfc: bool) -> Option<&'static Self> {
        TABLE.iter().find(|pre| {
            pre.patterns.iter().eq(patterns) && pre.ignore_merges == ignore_merges && pre.nfc == nfc
        })
    }

    pub(super) fn known_names() -> String {
        TABLE.iter().flat_map(|pre| pre.names).copied().collect::<Vec<_>>().join(", ")
    }
}

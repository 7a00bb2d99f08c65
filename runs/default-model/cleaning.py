"""From the raw text of a book or story to clean paragraphs and short documents.

Paragraphs are single lines. A document is a list of paragraphs of one chapter, about 1 to 3 kB, so that a context of a few
hundred tokens sees most of it. Whatever is not running prose ends the current section: a document never bridges a gap.
"""

import re
import unicodedata

SEPARATOR = "<|endoftext|>"
DOCUMENT_MIN = 500
DOCUMENT_TARGET = 1900
DOCUMENT_MAX = 3000

WORD = re.compile(r"[A-Za-z]+(?:'[A-Za-z]+)*")
SENTENCE_END = re.compile(r"""[.!?]+["')]*(?:\s+|$)""")

# Single characters that NFKD does not take apart.
FOLD = str.maketrans({
    "\u2018": "'", "\u2019": "'", "\u00b4": "'", "`": "'", "\u201c": '"', "\u201d": '"', "\u2013": "--", "\u2014": "--",
    "\u2015": "--", "\u2026": "...", "\u00e6": "ae", "\u00c6": "Ae", "\u0153": "oe", "\u0152": "Oe", "\u00a0": " ",
    "\u00ad": "", "\u200b": "", "\ufeff": "", "\u014b": "ng",
})

# Windows-1252 read as UTF-8: how one TinyStories copy spells its quotation marks.
MOJIBAKE = [("\u00e2\u20ac\u0153", '"'), ("\u00e2\u20ac\u2122", "'"), ("\u00e2\u20ac\u02dc", "'"),
            ("\u00e2\u20ac\u201c", "--"), ("\u00e2\u20ac\u201d", "--"), ("\u00e2\u20ac\u00a6", "..."),
            ("\u00e2\u20ac\u009d", '"'), ("\u00e2\u20ac", '"')]

MATTER = re.compile(
    r"^\W*(the |an? |author'?s? |publisher'?s? |translator'?s? |editor'?s? |transcriber'?s? |general |list of |table of |prefatory )*"
    r"(preface|introduct|contents|notes?\b|notice|dedicat|foreword|index\b|glossary|appendix|illustration|advertis|footnote|to the reader"
    r"|to my |by the same|books by|works of|biograph|bibliograph|list of|transcrib|to parents|a word to|directions for reading|end of)", re.I)

FURNITURE = re.compile(
    r"[\[\]{}|<>\\^~*_=#@]|\.{5,}|https?:|www\.|\(\d+\)|gutenberg|transcriber|\billustrat|copyright|footnote|\bibid|"
    r"\bpp?\. ?\d|\bvol\. ?[ivx\d]|\bpublish(?:ed|er|ing)|all rights reserved|\bisbn|printed (?:in|by)\b|frontispiece|"
    r"\bchapter\s+[ivxlc\d]+|\bedition\b|original reads|hyphenation", re.I)

NUMBERING = re.compile(r"^(?:(?:chapter|part|book|story|section|no\.?)\b|[IVXLC]+\b[.:]?(?!'|\s+[a-z])|\d+[.:)]?(?:\s|$))", re.I)


def ascii_fold(text):
    """Accents, typographic quotes and dashes to ASCII; what has no ASCII form stays and is for the caller to judge."""
    for bad, good in MOJIBAKE:
        text = text.replace(bad, good)
    text = unicodedata.normalize("NFKD", text.translate(FOLD))
    return "".join(c for c in text if not unicodedata.combining(c))


def tidy(line):
    """White space to single blanks, '' to double quotes, no blank before a stop or inside it 's and did n't."""
    line = line.replace("''", '"')
    line = re.sub(r"\s+", " ", line).strip()
    line = re.sub(r" +([,.;:!?])(?=\s|$|[\"'])", r"\1", line)
    line = re.sub(r"(?<=[A-Za-z]) (?='(?:s|ll|m|re|ve|d)\b)|(?<=[a-z]) (?=n't\b)", "", line)
    line = re.sub(r"\.( \.){2,}", "...", line)
    return line


def is_heading(paragraph):
    """A chapter number, a title in capitals or in title case, or any short line that is not a sentence."""
    text = paragraph.strip()
    if len(text) > 140:
        return False
    letters = [c for c in text if c.isalpha()]
    if not letters:
        return True
    capitals = sum(c.isupper() for c in letters) / len(letters)
    if capitals > 0.7 and len(letters) > 3:
        return True
    if NUMBERING.match(text) and not re.search(r"[.!?][\"']?$", text[6:]):
        return True
    words = WORD.findall(text)
    long_words = [w for w in words if len(w) > 3]
    if len(words) > 2 and long_words and all(w[0].isupper() for w in long_words) and '"' not in text and "'" != text[0]:
        return True
    return not re.search(r"[.!?:;,\-][\"')]*$", text)


def single_to_double_quotes(text):
    """Dialogue in single quotes (British printing) to double quotes, the inner double ones to single."""
    opening = len(re.findall(r"(?:^|\s)'[A-Z]", text, re.M))
    if opening < 40 or opening < text.count('"') / 2:
        return text
    text = text.replace('"', "\0")
    text = re.sub(r"(^|[\s(]|--)'(?=[A-Z0-9])", r'\1"', text, flags=re.M)
    text = re.sub(r"(?<=[,:] )'(?=[a-z])(?!(?:tis|twas|twere|twill|em|til|cause|tain|pon|gainst)\b)", '"', text)
    text = re.sub(r"(?<=[.,!?;:\-])'(?![A-Za-z])", '"', text)
    return text.replace("\0", "'")


def lower_first_capitals(paragraph, is_name):
    """'ONE hot summer day' to 'One hot summer day': printers set the first words of a chapter in capitals."""
    match = re.match(r"""^(["']?)((?:[A-Z][A-Z'\-]*[\s,]+)+|[A-Z]{2,}(?:'[A-Z]+)?[\s,.!?]+)(?=\S)""", paragraph)
    if not match or not re.search(r"[A-Z]{2}", match.group(2)):
        return paragraph
    words = re.split(r"([\s,.!?]+)", match.group(2))
    for i in range(0, len(words), 2):
        word = words[i]
        if word in ("", "I") or (i > 0 and len(word) == 1 and word != "A"):
            continue
        lower = word.lower()
        words[i] = lower.capitalize() if i == 0 or is_name(lower) or lower.startswith("i'") else lower
    return match.group(1) + "".join(words) + paragraph[match.end():]


def name_test(text):
    """A predicate: does this book write the (lower-case) word with a capital more often than not?"""
    upper, lower = {}, {}
    for word in re.findall(r"(?<=[a-z,] )[A-Za-z][a-z]+", text):
        counts = upper if word[0].isupper() else lower
        counts[word.lower()] = counts.get(word.lower(), 0) + 1
    return lambda word: upper.get(word.split("'")[0], 0) > lower.get(word.split("'")[0], 0)


def lower_emphasis(paragraph, is_name):
    """'You MUST come' to 'You must come': plain-text editions print italics so."""
    def lower(match):
        word = match.group(0).lower()
        return word.capitalize() if is_name(word) or re.search(r"(?:^|[.!?]\s+|[\"(]|: )$", paragraph[:match.start()]) else word

    return re.sub(r"\b[A-Z]{2,}(?:'[A-Z]+)?\b", lower, paragraph)


LINE_START = re.compile(
    r"[a-z'][,;:]? (?:To|And|The|For|With|That|As|But|In|Of|When|Or|So|Who|Which|Where|If|Is|Are|Must|By|From|On|At|Then|Than|Yet|Nor|Not|My|"
    r"Your|His|Her|Its|Our|Their|No|All|Have|Has|Be|Can|May|Just|They|She|We|You|It|This|These|Until|Before|While|How|Because)\b(?! [A-Z])")


def is_joined_verse(line):
    """Verse whose lines were joined: capitals keep beginning small words in the middle of sentences."""
    starts = len(LINE_START.findall(line))
    return starts > 0 and len(line.split()) <= 18 * starts


def is_fragment(line):
    """A line of verse set as a paragraph, or half a sentence that a picture or a page break parted from its other half."""
    if re.match(r"[a-z.,;:]", line) or not re.search(r"[.!?:;,\-][\"')]*$", line):
        return True
    return len(line) < 70 and bool(re.search(r"[,;]$", line))


def close_quotes(section):
    """A speech of several paragraphs opens each of them with a quote and closes only the last; here every one is closed."""
    closed = []
    for paragraph, after in zip(section, section[1:] + [""]):
        if paragraph.count('"') % 2 and after.startswith('"') and not paragraph.endswith('"') and re.search(r"[.!?]$", paragraph):
            paragraph += '"'
        closed.append(paragraph)
    return closed


def book_sections(raw):
    """Sections (chapters, or what lies between two gaps) of a book as lists of clean paragraphs."""
    raw = raw.split(SEPARATOR)[0]
    text = single_to_double_quotes(ascii_fold(raw))
    is_name = name_test(text)
    sections, current = [], []
    skip = False  # inside a preface, a list of contents, notes

    def close(drop_lead_in=False):
        nonlocal current
        # "Then he sang:" makes no sense once the song is gone.
        while drop_lead_in and current and not re.search(r"[.!?][\"')]*$", current[-1]):
            current.pop()
        if current:
            sections.append(close_quotes(current))
        current = []

    for block in text.split("\n\n"):
        if not block.strip():
            continue
        lines = [tidy(line) for line in block.strip().split("\n")]
        if all(is_heading(line) for line in lines):
            close()
            skip = any(MATTER.match(line) for line in lines)
        elif skip:
            continue
        elif len(lines) > 1 or FURNITURE.search(block) or not block.isascii() or is_fragment(lines[0]) or is_joined_verse(lines[0]):
            close(drop_lead_in=True)
        else:
            line = lines[0] if current else lower_first_capitals(lines[0], is_name)
            current.append(lower_emphasis(line, is_name))
    close()
    return sections


def cut(paragraphs):
    """Documents of DOCUMENT_MIN to DOCUMENT_MAX bytes; the cut falls where narration, not an answer, begins the next one."""
    documents, start = [], 0
    sizes = [len(p) + 2 for p in paragraphs]
    while start < len(paragraphs):
        rest = sum(sizes[start:])
        if rest <= DOCUMENT_MAX:
            documents.append(paragraphs[start:])
            break
        best, best_cost, size = start + 1, None, 0
        for end in range(start + 1, len(paragraphs) + 1):
            size += sizes[end - 1]
            if size > DOCUMENT_MAX:
                break
            after = paragraphs[end] if end < len(paragraphs) else ""
            cost = abs(size - DOCUMENT_TARGET) / DOCUMENT_TARGET
            cost += 0.4 * after.startswith('"') + 0.2 * bool(re.match(r"(He|She|It|They|But|And|So)\b", after)) + 0.3 * (rest - size < DOCUMENT_MIN)
            if best_cost is None or cost < best_cost:
                best, best_cost = end, cost
        documents.append(paragraphs[start:best])
        start = best
    return [d for d in documents if DOCUMENT_MIN <= sum(len(p) + 2 for p in d) <= DOCUMENT_MAX + 500]


def story_paragraphs(raw):
    """Paragraphs of a short story: every line of the source is one, unless a picture page parted a sentence."""
    out = []
    for line in ascii_fold(raw).split("\n"):
        line = tidy(line)
        if out and re.match(r"[a-z]", line) and not re.search(r"[.!?][\"')]*$", out[-1]):
            out[-1] += " " + line
        elif line:
            out.append(line)
    return out


# How TinyStories begin. The second kind also begins paragraphs in the middle of a story.
OPENING = re.compile(
    r"(?:Once\b|One (?:\w+ )?(?:day|night|morning|evening|afternoon|summer|winter)\b|There (?:was|were|lived|once)|It was an? |In an? |"
    r"On an? |A (?:little|small|big|long|young|kind|\w+ (?:boy|girl)))")
NAMED_OPENING = re.compile(r"(?!(?:He|She|It|They|We|You|I|The|This|That|But|And|So|Then|Mom|Dad|Everyone)\b)(?:[A-Z]\w+ and (?:\w+ )?\w+|[A-Z]\w+) (?:was|were|is|are|like|likes|liked|love|loves|loved|lived|had|went|wanted)\b")


def split_unseparated(text):
    """Stories of a file without separators: a blank line parts the paragraphs of a story, a mere line end parts two stories.

    In some stories there a mere line end parts paragraphs as well; so a story ends only where the next line reads like an
    opening, and a story that holds a line end of which this cannot be told is left out.
    """
    pieces, blank = [], True
    for line in text.split("\n"):
        if not line.strip():
            blank = True
            continue
        if blank and pieces:
            pieces[-1].append(line)
        else:
            pieces.append([line])
        blank = False
    stories = []  # [paragraphs, doubtful]
    for piece in pieces:
        named = bool(NAMED_OPENING.match(piece[0]))
        one_paragraph = stories and len(stories[-1][0]) == 1
        opens = OPENING.match(piece[0]) and (piece[0].startswith("Once") or not one_paragraph)
        if not stories or opens or (named and len(piece) > 1 and not one_paragraph):
            stories.append([piece, False])
        else:
            stories[-1] = [stories[-1][0] + piece, stories[-1][1] or named]
    return ["\n".join(story) for story, doubtful in stories if not doubtful and len(story) > 1]

#!/usr/bin/env python3
"""Prepare the training text of Setun's default model. Python 3 standard library only; same input, same bytes out.

    python3 runs/default-model/prepare.py CORPORA_DIR OUT_DIR
    python3 runs/default-model/prepare.py CORPORA_DIR OUT_DIR --attribution models/ATTRIBUTION.md
    python3 runs/default-model/prepare.py CORPORA_DIR OUT_DIR --smoke runs/smoke/story.txt

CORPORA_DIR holds (each text may also be packed as .txt.xz):

    childrens_books.txt, childrens_books.index.tsv      public domain in the US: children's books of Project Gutenberg and
                                                        Standard Ebooks, licence text and page furniture removed
    storybooks_ccby.txt, storybooks_ccby.index.tsv      CC BY: African Storybook (africanstorybook.org) and Pratham Books'
                                                        StoryWeaver (storyweaver.org.in)
    tinystories_part.txt, tinystories_part_noseps.txt   CDLA-Sharing-1.0: stories of TinyStories (R. Eldan, Y. Li)

In all of them paragraphs are lines; a line <|endoftext|> ends a book or story (the second TinyStories file has none). An index has the
columns offset_bytes, length_bytes, author, title, origin_repo, origin_path and one row per book or story, offsets into the unpacked text.

OUT_DIR receives {tinystories,storybooks,books}.{train,valid}.txt, valid.txt and report.json. Whole stories and whole books are held out,
chosen by a hash of the work before anything looks at the text; the word statistics that rank the books come from training works only.
"""

import argparse
import hashlib
import json
import lzma
import os
import re
import sys
from collections import Counter

sys.dont_write_bytecode = True  # leave no cache beside the scripts

from cleaning import SENTENCE_END, SEPARATOR, WORD, book_sections, cut, split_unseparated, story_paragraphs

HERE = os.path.dirname(os.path.abspath(__file__))

HELD_OUT_TINYSTORIES = 80
HELD_OUT_STORYBOOKS = 40
HELD_OUT_BOOKS = 8  # before the hard ones among them fall away
HELD_OUT_BOOK_MAX = 250_000  # bytes; keeps the held-out share near 2 %
VALID_BOOK_BYTES = 100_000  # share of the held-out books in valid.txt

COMMON_WORDS = 3000
BOOK_SCORE_MAX = 3.3  # see book_score
MAX_SENTENCE_WORDS = 24.0  # mean of a document
MIN_COMMON_SHARE = 0.86  # of a document's words
MIN_COMMON_SHARE_STORYBOOK = 0.78  # names and words of many languages are welcome there, whole foreign texts are not
MAX_DIALECT_PER_1000 = 8.0

ARCHAIC = re.compile(r"\b(?:thou|thee|thy|thine|hath|doth|quoth|unto|whence|wherefore|ye|'?tis|'?twas|prithee|verily|[a-z]+eth|saith)\b", re.I)
DIALECT = re.compile(
    r"(?<![A-Za-z'])'(?:em|im|er|ere|ave|ad|is|as|at|ed|ow|ouse|spect|spose|cause|cept|bout|fore|way|round)\b|[a-z]in'(?![a-z])"
    r"|\b(?:o'|an'|th'|wi'|ol'|de|dat|dis|dem|dey|den't|yo'|yer|ter|fer|git|wuz|sez|ain't|hain't|ole|mebbe|jest|kin|ketch|bein'|gwine|nuffin|suh|sah"
    r"|ma'am|nae|dinna|canna|wee|bairn|lad|thar|whar|hev|wot|wi)(?![a-z])", re.I)
VIOLENT = re.compile(
    r"\b(?:blood|bloody|bled|corpses?|murder\w*|slain|slay|slew|slaughter\w*|gallows|strangl\w*|skulls?|stabb\w*|gore|butcher\w*|dead bod\w+"
    r"|hanged|executed|execution|executioner|revolvers?|pistols?)\b", re.I)
GRUESOME = re.compile(
    r"\b(?:behead\w*|suicide|massacre\w*|entrails|tortur\w+|dismember\w*|disembowel\w*|cut (?:his|her|its|their|your|my|off (?:his|her|their|the|your|my)) (?:heads?|throats?)"
    r"|tore out|eyes out|hang (?:himself|herself|myself)|drowned (?:himself|herself))\b", re.I)
LESSON = re.compile(r"\b(?:questions?:|glossary|activity|activities|discuss:|answers?:|vocabulary|translat|translated by|illustrat|fill in the blank|www\.|http)", re.I)


# Authors and titles where the index gives none or a file name.
NAMES = {
    "At the Back of the North Wind": ("George MacDonald", "At the Back of the North Wind"),
    "English Fairy Tales": ("Joseph Jacobs", "English Fairy Tales"),
    "Raggedy Ann Stories": ("Johnny Gruelle", "Raggedy Ann Stories"),
    "Rebecca of Sunnybrook Farm": ("Kate Douglas Wiggin", "Rebecca of Sunnybrook Farm"),
    "The Adventures of Pinocchio": ("Carlo Collodi", "The Adventures of Pinocchio"),
    "The Velveteen Rabbit": ("Margery Williams", "The Velveteen Rabbit"),
    "Uncle Wiggily s Adventures": ("Howard R. Garis", "Uncle Wiggily's Adventures"),
}


def sha(text):
    return hashlib.sha256(text.encode()).hexdigest()


def letters(text):
    return re.sub(r"[^a-z]", "", text.lower())


def read_text(directory, name):
    """The bytes of NAME.txt, or of NAME.txt.xz unpacked."""
    path = os.path.join(directory, name + ".txt")
    try:
        if os.path.exists(path):
            with open(path, "rb") as file:
                return file.read()
        with lzma.open(path + ".xz") as file:
            return file.read()
    except (OSError, lzma.LZMAError) as error:
        sys.exit(f"prepare: cannot read {path} or {path}.xz: {error}; see the head of this script for the files needed")


def read_works(directory, name):
    """(author, title, origin, text) of every work of an indexed corpus."""
    raw = read_text(directory, name)
    path = os.path.join(directory, name + ".index.tsv")
    try:
        with open(path, encoding="utf-8") as file:
            rows = [line.rstrip("\n").split("\t") for line in file][1:]
    except OSError as error:
        sys.exit(f"prepare: cannot read {path}: {error}")
    works = []
    for number, row in enumerate(rows, 2):
        if len(row) != 6 or not row[0].isdigit() or not row[1].isdigit() or int(row[0]) + int(row[1]) > len(raw):
            sys.exit(f"prepare: {path} line {number}: expected six columns with an offset and a length inside the text")
        text = raw[int(row[0]):int(row[0]) + int(row[1])].decode("utf-8", "replace")
        works.append((row[2], row[3], row[4], text.split(SEPARATOR)[0]))
    return works


def read_table(name):
    """Rows of a tab-separated data file beside this script; lines that begin with # are remarks."""
    with open(os.path.join(HERE, name), encoding="utf-8") as file:
        return [line.rstrip("\n").split("\t") for line in file if line.strip() and not line.startswith("#")]


class Filter:
    """Says why a document is dropped, or None. Counts are kept per source and rule."""

    def __init__(self):
        self.blocked = {digest: category for category, digest in read_table("blocked.tsv")}
        self.cache = {}
        self.common = set()
        self.dropped = {}

    def category(self, term):
        if term not in self.cache:
            self.cache[term] = self.blocked.get(sha(term)[:16])
        return self.cache[term]

    def blocked_categories(self, text):
        words = re.findall(r"[a-z]+", text.lower())
        found = {self.category(word) for word in words}
        found.update(self.category(f"{a} {b}") for a, b in zip(words, words[1:]))
        return found

    def reason(self, source, paragraphs):
        text = "\n".join(paragraphs)
        found = self.blocked_categories(text)
        if "slur" in found:
            return "slur"
        if "crude" in found:
            return "crude word"
        if source in ("books", "smoke") and "dated" in found:
            return "dated view of a people or of disability"
        if not text.isascii():
            return "not ASCII"
        if GRUESOME.search(text) or len(VIOLENT.findall(text)) >= 2:
            return "violence"
        words = WORD.findall(text)
        if not words or len(text) < 150:
            return "too short"
        if source == "tinystories":
            return None if re.search(r"[.!?][\"')]*$", paragraphs[-1]) else "broken off"
        common = sum(word.lower() in self.common for word in words) / len(words)
        if sum(p.count('"') % 2 for p in paragraphs) > max(1, 0.15 * len(paragraphs)):
            return "unbalanced quotes"
        if source == "storybooks":
            if LESSON.search(text) or re.search(r"[*#_\[\]{}|<>]|\s-\s?[A-Z]\w+ [A-Z]\w+$", text, re.M):
                return "lesson or marks"
            if common < MIN_COMMON_SHARE_STORYBOOK:
                return "other language or rare words"
            if re.search(r"\bi\b(?!')|[a-z][.!?] [a-z]", text):
                return "small letters for capitals"
            ended = sum(bool(re.search(r"[.!?,;:][\"')]*$", p)) for p in paragraphs)
            return None if ended >= 0.8 * len(paragraphs) else "not sentences"
        if len(words) / max(1, len(sentences(text))) > MAX_SENTENCE_WORDS:
            return "long sentences"
        if common < MIN_COMMON_SHARE:
            return "rare words"
        if len(DIALECT.findall(text)) * 1000 > MAX_DIALECT_PER_1000 * len(words):
            return "dialect"
        if len(ARCHAIC.findall(text)) * 1000 > 4 * len(words):
            return "archaic"
        if len(re.findall(r"\d", text)) > 8 or len(re.findall(r"\b[A-Z]{3,}\b", text)) > 5:
            return "figures or capitals"
        return None

    def keep(self, source, paragraphs):
        reason = self.reason(source, paragraphs)
        if reason:
            self.drop(source, reason)
        return reason is None

    def drop(self, source, reason):
        self.dropped.setdefault(source, Counter())[reason] += 1


def sentences(text):
    return [s for line in text.split("\n") for s in SENTENCE_END.split(line) if s.strip()]


def sample(documents, limit=200_000):
    """The paragraphs of a book, up to about `limit` bytes, as one text."""
    out, size = [], 0
    for document in documents:
        out.extend(document)
        size += sum(map(len, document))
        if size > limit:
            break
    return "\n".join(out)


def book_score(documents, common):
    """Lower is simpler: words per sentence / 10, plus a tenth per percent of words outside the common ones, plus dialect."""
    text = sample(documents)
    words = WORD.findall(text)
    if len(words) < 200:
        return 99.0
    rare = 1 - sum(word.lower() in common for word in words) / len(words)
    dialect = len(DIALECT.findall(text)) * 1000 / len(words)
    return len(words) / len(sentences(text)) / 10 + 10 * rare + dialect / 20


def near_copy_keys(paragraphs):
    """What two copies of a passage share: its sentences of some length, letters only."""
    return {letters(s) for p in paragraphs for s in SENTENCE_END.split(p) if len(s) >= 40}


def copies(keys, seen):
    return len(keys & seen) > max(1, 0.2 * len(keys))


def split_held_out(works, count, key):
    """(training, held out): the `count` works with the smallest hash are held out."""
    order = sorted(range(len(works)), key=lambda i: sha("held out " + key(works[i])))
    held = set(order[:count])
    return [w for i, w in enumerate(works) if i not in held], [w for i, w in enumerate(works) if i in held]


def stories(source, works, count, filters):
    """Training and held-out documents of a corpus of short stories; `works` are (author, title, paragraphs)."""
    unique, known = [], set()
    for work in works:
        key = letters("".join(work[2]))
        if key in known:
            filters.drop(source, "duplicate")
            continue
        known.add(key)
        unique.append(work)
    train, held = split_held_out(unique, count, lambda w: letters("".join(w[2])))
    held = [w for w in held if filters.keep(source, w[2])]
    seen = set().union(*(near_copy_keys(w[2]) for w in held))
    kept = []
    for work in train:
        if near_copy_keys(work[2]) & seen and copies(near_copy_keys(work[2]), seen):
            filters.drop(source, "near copy of a held-out work")
        elif filters.keep(source, work[2]):
            kept.append(work)
    return kept, held


def books(works, filters):
    """Training and held-out books as (author, title, documents), simplest first; needs filters.common."""
    excluded = {row[0]: row[1] for row in read_table("excluded_books.tsv")}
    titles = {title for _, title, _, _ in works}
    for title in excluded:
        if title not in titles:
            print(f"prepare: excluded_books.tsv names '{title}', which the corpus lacks", file=sys.stderr)
    eligible = [w for w in works if w[1] not in excluded]
    long_ones = [w for w in eligible if len(w[3]) > HELD_OUT_BOOK_MAX]
    train, held = split_held_out([w for w in eligible if len(w[3]) <= HELD_OUT_BOOK_MAX], HELD_OUT_BOOKS, lambda w: w[0] + "|" + w[1])
    train += long_ones

    def documents(work):
        return [d for section in book_sections(work[3]) for d in cut(section)]

    train = [(w[0], w[1], documents(w)) for w in train]
    held = [(w[0], w[1], documents(w)) for w in held]
    counts = Counter()
    for _, _, docs in train:
        counts.update(word.lower() for word in WORD.findall(sample(docs)))
    filters.common |= {word for word, _ in sorted(counts.items(), key=lambda x: (-x[1], x[0]))[:COMMON_WORDS]}

    def simple(group):
        scored = sorted((round(book_score(docs, filters.common), 4), author, title, docs) for author, title, docs in group)
        for score, _, _, docs in scored:
            if score > BOOK_SCORE_MAX:
                filters.dropped.setdefault("books", Counter())["book too hard"] += len(docs)
        return [s for s in scored if s[0] <= BOOK_SCORE_MAX]

    result, seen = [], set()
    for group in (simple(held), simple(train)):
        part = []
        for score, author, title, docs in group:
            kept = []
            for doc in docs:
                keys = near_copy_keys(doc)
                if copies(keys, seen):
                    filters.drop("books", "copy of another book's passage")
                elif filters.keep("books", doc):
                    kept.append(doc)
            for doc in docs:
                seen |= near_copy_keys(doc)
            if kept:
                part.append((author, title, kept, score))
        result.append(part)
    return result[1], result[0]


def text_of(documents):
    return "".join("\n\n".join(d) + f"\n{SEPARATOR}\n" for d in documents)


def write(path, text, report):
    os.makedirs(os.path.dirname(path) or ".", exist_ok=True)
    with open(path, "w", encoding="ascii", newline="\n") as file:
        file.write(text)
    entry = {"bytes": len(text), "documents": text.count(f"\n{SEPARATOR}\n"), "sha256": sha(text)}
    report[os.path.basename(path)] = entry
    print(f"{os.path.basename(path):24} {entry['bytes']:>11,} bytes {entry['documents']:>7,} documents  sha256 {entry['sha256']}")


def ascii_name(text):
    return re.sub(r"\s+", " ", text.replace("\u2019", "'")).strip()


def attribution(train_books, held_books, all_stories):
    """models/ATTRIBUTION.md: what must travel with a model trained on this text."""
    lines = [
        "# Attribution", "",
        "The text that Setun's default model was trained and evaluated on, made by `runs/default-model/prepare.py`, which shortened, "
        "filtered and re-divided the works named here. The model ships under this attribution.", "",
        "## TinyStories (CDLA-Sharing-1.0)", "",
        "Part of the data set of Ronen Eldan and Yuanzhi Li, *TinyStories: How Small Can Language Models Be and Still Speak Coherent English?*, "
        "arXiv:2305.07759. Licence: Community Data License Agreement - Sharing - Version 1.0, https://cdla.dev/sharing-1-0/. "
        "Changes: duplicates and a few stories removed, white space made uniform.", "",
        "## Picture-book stories (CC BY)", "",
        "Text of stories marked CC BY (or public domain) by African Storybook (https://www.africanstorybook.org) and Pratham Books' StoryWeaver "
        "(https://storyweaver.org.in), taken from the Global African Storybook and Pratham Books source collections (asp-source, pb-source). "
        "Licence: Creative Commons Attribution in the version each story names there (https://creativecommons.org/licenses/by/4.0/ or "
        "https://creativecommons.org/licenses/by/3.0/). Changes: pictures and page breaks left out, "
        "quotation marks and white space made uniform. Title - author:", ""]
    for repo, name in (("asp-source", "African Storybook"), ("pb-source", "Pratham Books StoryWeaver")):
        rows = sorted({(ascii_name(t), ascii_name(a) or "author not named") for a, t, r in all_stories if r.endswith(repo)})
        lines += [f"### {name}: {len(rows)} stories", ""] + [f"- {t} - {a}" for t, a in rows] + [""]
    lines += ["## Books (public domain in the US)", "",
              "Texts of Project Gutenberg and Standard Ebooks (CC0 transcriptions). Works may be under copyright elsewhere. "
              "Books marked * were held out for evaluation.", ""]
    rows = [(a, t, "") for a, t, _, _ in train_books] + [(a, t, " *") for a, t, _, _ in held_books]
    by_author = {}
    for a, t, mark in rows:
        a, t = NAMES.get(t, (a, t))
        by_author.setdefault(ascii_name(a) or "Others", []).append(ascii_name(t).replace("_", "'") + mark)
    lines += [f"- {a}: " + "; ".join(sorted(by_author[a])) for a in sorted(by_author)]
    return "\n".join(lines) + "\n"


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("corpora_dir")
    parser.add_argument("out_dir")
    parser.add_argument("--attribution", metavar="FILE", help="also write the attribution list")
    parser.add_argument("--smoke", metavar="FILE", help="also write the text of the smoke run, from the books in smoke_books.tsv")
    options = parser.parse_args()

    filters = Filter()
    raw_books = read_works(options.corpora_dir, "childrens_books")
    train_books, held_books = books(raw_books, filters)

    tiny = [("", "", story_paragraphs(s)) for s in read_text(options.corpora_dir, "tinystories_part").decode().split(SEPARATOR)]
    tiny += [("", "", story_paragraphs(s)) for s in split_unseparated(read_text(options.corpora_dir, "tinystories_part_noseps").decode())]
    tiny = [(a, t, [p for p in s if not re.fullmatch(r"the end[.!]?", p, re.I)]) for a, t, s in tiny]
    tiny_train, tiny_held = stories("tinystories", [w for w in tiny if w[2]], HELD_OUT_TINYSTORIES, filters)

    for work in tiny_train:
        filters.common.update(word.lower() for word in WORD.findall(" ".join(work[2])))
    picture = [(a, t, story_paragraphs(text), r) for a, t, r, text in read_works(options.corpora_dir, "storybooks_ccby")]
    picture_train, picture_held = stories("storybooks", [w for w in picture if w[2]], HELD_OUT_STORYBOOKS, filters)

    out, files = options.out_dir, {}
    parts = {
        "tinystories": ([w[2] for w in tiny_train], [w[2] for w in tiny_held]),
        "storybooks": ([w[2] for w in picture_train], [w[2] for w in picture_held]),
        "books": ([d for b in train_books for d in b[2]], [d for b in held_books for d in b[2]]),
    }
    for name, (train, held) in parts.items():
        write(os.path.join(out, f"{name}.train.txt"), text_of(train), files)
        write(os.path.join(out, f"{name}.valid.txt"), text_of(held), files)
    held = parts["books"][1]
    step = max(1, len(text_of(held)) // VALID_BOOK_BYTES)
    write(os.path.join(out, "valid.txt"), text_of(parts["tinystories"][1] + parts["storybooks"][1] + held[::step]), files)

    report = {
        "files": files,
        "dropped_documents": {s: dict(sorted(c.items())) for s, c in sorted(filters.dropped.items())},
        "books": [{"author": a, "title": t, "score": s, "documents": len(d), "split": split}
                  for split, group in (("train", train_books), ("valid", held_books)) for a, t, d, s in group],
    }
    with open(os.path.join(out, "report.json"), "w", encoding="utf-8") as file:
        json.dump(report, file, indent=1, ensure_ascii=False)
        file.write("\n")
    for source, counts in report["dropped_documents"].items():
        print(f"dropped from {source}: " + ", ".join(f"{rule} {n}" for rule, n in counts.items()))
    print(f"books used: {len(train_books)} for training, {len(held_books)} held out")

    if options.attribution:
        with open(options.attribution, "w", encoding="utf-8", newline="\n") as file:
            file.write(attribution(train_books, held_books, [(w[0], w[1], w[3]) for w in picture_train + picture_held]))
    if options.smoke:
        wanted = [row[0] for row in read_table("smoke_books.tsv")]
        chosen = [d for _, title, _, text in raw_books if title in wanted
                  for section in book_sections(text) for d in cut(section) if filters.keep("smoke", d)]
        write(options.smoke, text_of(chosen), files)


if __name__ == "__main__":
    main()

"""python3 -m unittest discover -s runs/default-model -p 'test_*.py'"""

import sys
import unittest

sys.dont_write_bytecode = True

import cleaning
from prepare import Filter, near_copy_keys, split_held_out

PROSE = "The old fox ran down the hill to the pond, and there he saw a duck who was fast asleep in the tall grass. " * 3


class Cleaning(unittest.TestCase):
    def test_headings_are_told_from_sentences(self):
        for heading in ("CHAPTER IV", "VII", "III. HOW REDDY FOX WAS SURPRISED", "The Goose-Girl", "Chapter 13 BOTH SIDES", "12"):
            self.assertTrue(cleaning.is_heading(heading), heading)
        for line in ("I went home.", '"Come in!"', "Pooh nodded.", "And she burst into tears.", '"No," said he.'):
            self.assertFalse(cleaning.is_heading(line), line)

    def test_prefaces_and_title_pages_are_dropped(self):
        raw = "\n\n".join(["A BOOK", "by", "A. Writer", "PREFACE", PROSE, "CONTENTS\nI The Fox 3", "I", "THE FOX", PROSE.replace("old", "wise")])
        self.assertEqual([cleaning.tidy(PROSE.replace("old", "wise"))], [p for s in cleaning.book_sections(raw) for p in s])

    def test_verse_ends_a_section_and_takes_its_lead_in_with_it(self):
        raw = "\n\n".join(["I", PROSE, "Then he sang:", "Tra la,\nla la!", PROSE])
        self.assertEqual([1, 1], [len(s) for s in cleaning.book_sections(raw)])

    def test_joined_verse_is_told_from_prose(self):
        self.assertTrue(cleaning.is_joined_verse("The imp of mischief, dear to me, Is always busy as a bee."))
        self.assertFalse(cleaning.is_joined_verse('He said, "The fox is here." Then Peter Rabbit and the King of Oz ran.'))

    def test_parted_contractions_are_joined(self):
        self.assertEqual("It's so, I'm sure, and she didn't go to 'Sleepy'.", cleaning.tidy("It 's so, I 'm sure, and she did n't go to 'Sleepy'."))

    def test_capitals_at_a_chapter_start_and_for_emphasis_become_small(self):
        self.assertEqual("One hot day Tom ran.", cleaning.lower_first_capitals("ONE hot day Tom ran.", lambda w: False))
        self.assertEqual("You must go, Anne.", cleaning.lower_emphasis("You MUST go, ANNE.", lambda w: w == "anne"))

    def test_open_speech_of_several_paragraphs_is_closed(self):
        self.assertEqual(['"One."', '"Two."'], cleaning.close_quotes(['"One.', '"Two."']))

    def test_documents_keep_their_bounds_and_every_paragraph_of_a_chapter(self):
        chapter = [f"{i} " + "word " * 50 for i in range(60)]
        documents = cleaning.cut(chapter)
        self.assertEqual(chapter, [p for d in documents for p in d])
        for d in documents:
            self.assertLessEqual(sum(len(p) + 2 for p in d), cleaning.DOCUMENT_MAX)

    def test_unseparated_stories_are_parted_at_openings_only(self):
        text = "Once there was a cat.\n\nIt sat.\nOne day, a dog ran.\n\nIt barked.\nHe was glad.\n\nThe end."
        self.assertEqual(["Once there was a cat.\nIt sat.", "One day, a dog ran.\nIt barked.\nHe was glad.\nThe end."], cleaning.split_unseparated(text))

    def test_windows_1252_quotes_are_repaired(self):
        self.assertEqual('"Hi," it\'s me', cleaning.ascii_fold("\u00e2\u20ac\u0153Hi,\u00e2\u20ac it\u00e2\u20ac\u2122s me"))


class Filtering(unittest.TestCase):
    def test_a_blocked_word_drops_the_document_in_any_case_and_plural_pairs_too(self):
        filters = Filter()
        filters.blocked, filters.cache = {cleaning_hash("snark"): "slur", cleaning_hash("old boojum"): "dated"}, {}
        self.assertEqual("slur", filters.reason("tinystories", ["He met a SNARK, and ran."]))
        self.assertEqual("dated view of a people or of disability", filters.reason("books", ["He met an old boojum."]))
        self.assertNotIn(filters.reason("books", ["He met an old man, a boojum."]), ("slur", "dated view of a people or of disability"))

    def test_held_out_works_do_not_depend_on_the_order_of_the_input(self):
        works = [str(i) for i in range(50)]
        self.assertEqual(sorted(split_held_out(works, 5, str)[1]), sorted(split_held_out(works[::-1], 5, str)[1]))

    def test_the_same_sentence_in_another_dress_is_a_copy(self):
        self.assertEqual(near_copy_keys(['"The old fox ran down the long hill to the pond."']), near_copy_keys(["The OLD fox ran down the long hill, to the pond!"]))


def cleaning_hash(term):
    import hashlib
    return hashlib.sha256(term.encode()).hexdigest()[:16]


if __name__ == "__main__":
    unittest.main()

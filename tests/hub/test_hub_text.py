import pytest
from markdown_it import MarkdownIt

from hf_immunize.hub.text import code_place, plain, slug


@pytest.mark.parametrize("text", ["https://evil.example", "HTTPS://E.x", "www.evil.example", "WWW.e.x", "a@b.cc"])
def test_addresses_do_not_become_links(text):
    escaped = plain(text).lower()
    assert "://" not in escaped
    assert "www." not in escaped
    assert "@" not in escaped


@pytest.mark.parametrize("text", ["Golden retriever 2", "scikit-learn digits 0 to 4", "日本語", "naïve café"])
def test_ordinary_names_stay(text):
    assert plain(text) == text


@pytest.mark.parametrize("text", ["a*b*c", "<b>x</b>", "1. x", "- x", "# x", "x|y", "`x`", "\\*x", "&amp;", "~x~"])
def test_the_reader_sees_what_was_written(text):
    tokens = MarkdownIt("commonmark").parse(f"- {plain(text)}")
    inline = next(token for token in tokens if token.type == "inline")
    assert "".join(child.content for child in inline.children) == text


def test_hidden_characters_are_dropped():
    assert plain("abc\u202ed\u200be\x00f") == "abcdef"


def test_slug_of_anything_is_an_identifier():
    assert slug("a b/../c") == "a-b-c"


def test_code_takes_only_ids():
    assert code_place("user/model'); evil('") == "path/to/this/folder"

"""Text to Message or MessageError, and the patches that leave all other text alone."""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import ocpp_2w_proxy as p

CALL, CALLRESULT, CALLERROR, CALLRESULTERROR, SEND = p.MESSAGE_TYPES
LONG = 5000 * "9"
MARK = "<here>"

blanks = st.text(" \t\r\n", max_size=3)
numbers = st.integers() | st.floats(allow_nan=False, allow_infinity=False)
scalars = st.none() | st.booleans() | numbers | st.text() | st.sampled_from(["\ud800", "\x00"])
keys = st.sampled_from("abc") | st.text()
values = st.recursive(scalars, lambda inner: st.lists(inner) | st.dictionaries(keys, inner), max_leaves=20)
payloads = st.dictionaries(keys, values, max_size=6)
ids = st.text(min_size=1, max_size=p.MAX_MESSAGE_ID) | st.integers()
messages = st.one_of(
    st.tuples(st.sampled_from([CALL, SEND]), ids, st.text(), payloads),
    st.tuples(st.just(CALLRESULT), ids, payloads),
    st.tuples(st.sampled_from([CALLERROR, CALLRESULTERROR]), ids, st.text(), st.text(), payloads),
)
Spell = Callable[[Any], str]


@st.composite
def spellings(draw: st.DrawFn) -> Spell:
    """One of the ways to write JSON down."""
    ascii_only = draw(st.booleans())
    comma, colon = (
        draw(st.builds("{},{}".format, blanks, blanks)),
        draw(st.builds("{}:{}".format, blanks, blanks)),
    )
    return lambda value: json.dumps(value, ensure_ascii=ascii_only, separators=(comma, colon))


def outcome(text: str) -> p.Message | p.MessageError:
    """Return what the text is, or why it is none."""
    try:
        return p.parse(text)
    except p.MessageError as error:
        return error


# Parsing.


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        *(('[2,"1","A",{},"more"]', (CALL, "1", "A", {})), ('[3,"1",{},"more"]', (CALLRESULT, "1", "", {}))),
        *(('[2,"1","A",null]', (CALL, "1", "A", {})), ('[6,"1","A",null]', (SEND, "1", "A", {}))),
        *(('[3,"1",null]', (CALLRESULT, "1", "", {})), ('[3,"1",[ ]]', (CALLRESULT, "1", "", {}))),
        *(('[4,"1",""]', (CALLERROR, "1", "", {})), ('[4,"1","E","why"]', (CALLERROR, "1", "E", {}))),
        ('[4,"1","E",1,"details"]', (CALLERROR, "1", "E", {})),
        ('[2,"1","A",{"a":1,"a":2}]', (CALL, "1", "A", {"a": 2})),
        ('[2,"1","A",{"idTag":"04A1\x00\x1f\n"}]', (CALL, "1", "A", {"idTag": "04A1\x00\x1f\n"})),
        ('\n [ 2 , "\\u0031" , "A" , { } ]\t', (CALL, "1", "A", {})),
    ],
)
def test_what_is_not_quite_a_message_is_read(text: str, expected: tuple[Any, ...]) -> None:
    """As peers write it, and it keeps its text."""
    assert p.parse(text) == (*expected, text)


NO_MESSAGES = [
    *("", " ", "PING", "null", "{}", '"text"', "1", "[]", "[2]", '[3,"1"]'),
    *('[1,"1","A",{}]', '[7,"1","A",{}]', '[-2,"1","A",{}]', '["2","1","A",{}]', '[2.0,"1","A",{}]'),
    *('[true,"1","A",{}]', '[null,"1","A",{}]', '[[2],"1","A",{}]', f'[{LONG},"1","A",{{}}]'),
    *('[2,1.5,"A",{}]', '[2,true,"A",{}]', '[2,null,"A",{}]', '[2,["1"],"A",{}]', '[3,"1",1]', '[3,"1",[1]]'),
    *('[3,"1",""]', '[4,"1",1,"",{}]', '[5,"1",{},"",{}]', '[6,"1","A"]', '[6,"1","A",[]]'),
    *('[3,"1",{"a":NaN}]', f'[3,"1",{{"a":{LONG}}}]', '[3,"1",{}],', '[3,"1",{}][3,"1",{}]'),
    '\ufeff[3,"1",{}]',
    *("[" * 100_000, '{"a":' * 100_000, '[3,"1",' + '{"a":' * 100_000 + "1" + "}" * 100_000 + "]"),
    # Calls whose id would have to be guessed.
    *(f'[2,"{spelt}","A"]' for spelt in ("", "\\u0041", "a\\n", "a\nb", 256 * "i")),
]
DAMAGED_CALLS = [
    *('[2,ID,"A"]', '[2,ID,"A",1]', '[2,ID,"A",[]]', '[2,ID,"A",""]', "[2,ID,1,{}]", "[2,ID,null,{}]"),
    "[2,ID,",
    *('[2,ID,"A",{"a":1,}]', '[2,ID,"A",{a:1}]', "[2,ID,'A',{}]", '[2,ID,"A",{}]]', ' [ 2 , ID , "A" ]'),
    *('[2,ID,"A",{"a":NaN}]', '[2,ID,"A",{"a":-Infinity}]', f'[2,ID,"A",{{"a":-{LONG}}}]'),
    '[2,ID,"A",{"a":' + "[" * 100_000 + "]" * 100_000 + "}]",
]


@pytest.mark.parametrize(
    ("text", "message_id"),
    [
        *((text, None) for text in NO_MESSAGES),
        *((text, known) for text in DAMAGED_CALLS for known in ("i", 17, p.MAX_MESSAGE_ID * "i")),
        *(('[2,"i"', "i"), ('[2,"i"]', "i")),
    ],
)
def test_what_cannot_be_read(text: str, message_id: p.MessageId | None) -> None:
    """Says why in a few words; a Call tells its id, so that it can be answered."""
    error = outcome(text.replace("ID", json.dumps(message_id)))
    assert isinstance(error, p.MessageError)
    assert error.message_id == message_id
    assert 0 < len(str(error)) <= 200
    assert p.error_text(1, "E", 300 * "x") == f'[4,1,"E","{255 * "x"}",{{}}]'


@st.composite
def damaged(draw: st.DrawFn) -> str:
    """A message with another text somewhere in it."""
    text = draw(spellings())(draw(messages))
    start = draw(st.integers(0, len(text)))
    return text[:start] + draw(st.text(max_size=5)) + text[draw(st.integers(start, len(text))) :]


likely = st.builds(
    lambda number, rest, spell: spell(rest[0] if number is None else [number, *rest]),
    st.none() | st.integers(1, 7),
    st.lists(values | st.floats(), min_size=1, max_size=5),
    spellings(),
)


@settings(deadline=None, max_examples=300)
@given(st.text() | st.text('[]{}",:23456\\u0dun. \x00') | likely | damaged())
def test_any_text(text: str) -> None:
    """For any text or JSON, or damaged message: Message or MessageError, never any other exception."""
    result = outcome(text)
    if isinstance(result, p.MessageError):
        assert result.message_id is None or str(result.message_id) in text
    else:
        assert (result.text, type(result.type), type(result.payload)) == (text, int, dict)
        assert type(result.message_id) is int or 1 <= len(str(result.message_id)) <= p.MAX_MESSAGE_ID


@settings(deadline=None)
@given(messages, spellings())
def test_any_message(parts: tuple[Any, ...], spell: Spell) -> None:
    """Every well-formed message is read as what it says, however it is spelt."""
    kind, message_id, *rest = parts
    text = spell(parts)
    assert p.parse(text) == (
        kind,
        message_id,
        "" if kind is CALLRESULT else rest[0],
        json.loads(json.dumps(rest[-1])),
        text,
    )


# Patching.


@pytest.mark.parametrize(
    ("text", "path", "value", "patched"),
    [
        ('[2,"1","A",{"a": 1.10 ,"b":1E400}]', (3, "a"), 7, '[2,"1","A",{"a": 7 ,"b":1E400}]'),
        ('[2,"1","A",{"a":{"b":[]}}]', (3, "a"), "x", '[2,"1","A",{"a":"x"}]'),
        ('[2,"1","A",{"a":1}]', (3, "a"), "\xe4\n\ud800", '[2,"1","A",{"a":"\\u00e4\\n\\ud800"}]'),
        ('[2,"1","A",{"a":1,"\\u0061":2}]', (3, "a"), 3, '[2,"1","A",{"a":1,"\\u0061":3}]'),
        ('[2,"1","A",{"a":[{"b":1},{"b":2}]}]', (3, "a", 1, "b"), 3, '[2,"1","A",{"a":[{"b":1},{"b":3}]}]'),
        ('[2,"1","A",{"}]\\"":"\n]","a":4}]', (3, "a"), 3, '[2,"1","A",{"}]\\"":"\n]","a":3}]'),
        ('[2,"1","A",{ "b":1}]', (3, "a"), 3, '[2,"1","A",{"a":3, "b":1}]'),
        ('[2,"1","A",{"b":{"c":1}}]', (3, "b", "a"), 3, '[2,"1","A",{"b":{"a":3,"c":1}}]'),
        ('[2,"1","A", { } ]', (3, "a"), "x", '[2,"1","A", {"a":"x" } ]'),
        ('[2,"1","A", null ]', (3, "a"), 3, '[2,"1","A", {"a":3} ]'),
    ],
)
def test_patch(text: str, path: p.TextPath, value: str | int, patched: str) -> None:
    """One value is replaced, or added as its object's first key; the last of two keys counts."""
    assert p.patch(text, path, value) == patched


@settings(deadline=None)
@given(messages, spellings(), st.lists(keys, min_size=1, max_size=4), st.text() | st.integers(), st.data())
def test_patch_any_value(
    parts: tuple[Any, ...], spell: Spell, path: list[str], value: str | int, data: st.DataObject
) -> None:
    """Patching one value of a message changes that value and no other character."""
    marked: Any = MARK
    for key in reversed(path):
        marked = {**data.draw(payloads), key: marked}
    head, tail = spell((*parts[:-1], marked)).split(p.dump(MARK))
    patched = p.patch(f'{head}"04A1"{tail}', (len(parts) - 1, *path), value)
    assert patched == head + p.dump(value) + tail

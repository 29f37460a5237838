"""Text to Message or MessageError, and the patches that leave all other text alone."""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import ocpp_2w_proxy as p

CALL, CALLRESULT, CALLERROR, CALLRESULTERROR, SEND = p.MessageType
LONG = 5000 * "9"
MARK = "<here>"

blanks = st.text(" \t\r\n", max_size=3)
numbers = st.integers() | st.floats(allow_nan=False, allow_infinity=False)
scalars = st.none() | st.booleans() | numbers | st.text() | st.sampled_from(["\ud800", "\x00"])
keys = st.sampled_from("abc") | st.text().filter(lambda key: key != "*")  # In a FieldPath: every element.
values = st.recursive(scalars, lambda inner: st.lists(inner) | st.dictionaries(keys, inner), max_leaves=20)
payloads = st.dictionaries(keys, values, max_size=6)
ids = st.text(min_size=1, max_size=p.MAX_MESSAGE_ID) | st.integers()
actions = st.text()
messages = st.one_of(
    st.tuples(st.sampled_from([CALL, SEND]), ids, actions, payloads),
    st.tuples(st.just(CALLRESULT), ids, payloads),
    st.tuples(st.sampled_from([CALLERROR, CALLRESULTERROR]), ids, actions, st.text(), payloads),
)
separators = st.tuples(
    st.builds("{},{}".format, blanks, blanks),
    st.builds("{}:{}".format, blanks, blanks),
)


@st.composite
def spellings(draw: st.DrawFn) -> Callable[[Any], str]:
    """One of the ways to write JSON down."""
    ascii_only, between = draw(st.booleans()), draw(separators)
    return lambda value: json.dumps(value, ensure_ascii=ascii_only, separators=between)


def outcome(text: str) -> p.Message | p.MessageError:
    """Return what the text is, or why it is none."""
    try:
        return p.parse(text)
    except p.MessageError as error:
        return error


def refused(text: str) -> p.MessageError:
    """Return the error that the text gives."""
    error = outcome(text)
    assert isinstance(error, p.MessageError)
    return error


# Parsing.


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ('[2,"1","Reset",{"type":"Soft"}]', (CALL, "1", "Reset", {"type": "Soft"})),
        ('[3,"1",{"status":"Accepted"}]', (CALLRESULT, "1", "", {"status": "Accepted"})),
        ('[4,"1","GenericError","why",{"a":1}]', (CALLERROR, "1", "GenericError", {"a": 1})),
        ('[5,"1","GenericError","why",{"a":1}]', (CALLRESULTERROR, "1", "GenericError", {"a": 1})),
        ('[6,"1","NotifyPeriodicEventStream",{}]', (SEND, "1", "NotifyPeriodicEventStream", {})),
        ('\n [ 2 , "1" , "A" , { } ]\t', (CALL, "1", "A", {})),
        *(('[2,"1","A",{},"more"]', (CALL, "1", "A", {})), ('[3,"1",{},"more"]', (CALLRESULT, "1", "", {}))),
        *(('[2,"1","",{}]', (CALL, "1", "", {})), ('[2,"1","A",null]', (CALL, "1", "A", {}))),
        *(('[3,"1",null]', (CALLRESULT, "1", "", {})), ('[3,"1",[]]', (CALLRESULT, "1", "", {}))),
        *(('[3,"1",[ ]]', (CALLRESULT, "1", "", {})), ('[6,"1","A",null]', (SEND, "1", "A", {}))),
        *(('[4,"1",""]', (CALLERROR, "1", "", {})), ('[4,"1","E","why"]', (CALLERROR, "1", "E", {}))),
        ('[4,"1","E","why",null]', (CALLERROR, "1", "E", {})),
        ('[4,"1","E",1,"details"]', (CALLERROR, "1", "E", {})),
        ('[2,"\\u0031","\\u0041",{"\\u0061":1}]', (CALL, "1", "A", {"a": 1})),
        ('[2,"\ud800","A",{"a":"\\udfff"}]', (CALL, "\ud800", "A", {"a": "\udfff"})),
        ('[2,"1","A",{"a":1,"a":2}]', (CALL, "1", "A", {"a": 2})),
        ('[2,"1","A",{"idTag":"04A1\x00\x1f\n"}]', (CALL, "1", "A", {"idTag": "04A1\x00\x1f\n"})),
        (f'[2,"{255 * "i"}","{64 * "A"}",{{}}]', (CALL, 255 * "i", 64 * "A", {})),
        ('[2,"1","A",{"a":9223372036854775807}]', (CALL, "1", "A", {"a": 2**63 - 1})),
        *(('[2,12345678,"A",{}]', (CALL, 12345678, "A", {})), ("[3,0,{}]", (CALLRESULT, 0, "", {}))),
    ],
)
def test_parse_well_formed(text: str, expected: tuple[p.MessageType, str, str, dict[str, Any]]) -> None:
    """Each of the five types is read, leniently, and keeps its text."""
    assert p.parse(text) == (*expected, text)


NO_MESSAGES = [
    *("", " ", "PING", "null", "{}", '"text"', "1", "[]", "[2]", '[3,"1"]'),
    *('[1,"1","A",{}]', '[7,"1","A",{}]', '[-2,"1","A",{}]', '["2","1","A",{}]', '[2.0,"1","A",{}]'),
    *('[true,"1","A",{}]', '[null,"1","A",{}]', '[[2],"1","A",{}]', f'[{LONG[:4000]},"1","A",{{}}]'),
    *(f'[{LONG},"1","A",{{}}]', '[2,1.5,"A",{}]', '[2,true,"A",{}]', '[2,null,"A",{}]', '[2,["1"],"A",{}]'),
    *('[3,"1",1]', '[3,"1",[1]]', '[3,"1",""]', '[4,"1",1,"",{}]', '[4,"1",null,"",{}]', '[5,"1",{},"",{}]'),
    *('[6,"1","A"]', '[6,"1","A",[]]', '[3,"1",{"a":NaN}]', f'[3,"1",{{"a":{LONG}}}]', '[3,"1",{}],'),
    *('[3,"1",{}][3,"1",{}]', '\ufeff[3,"1",{}]', "[" * 100_000, "[" * 100_000 + "]" * 100_000),
    *('{"a":' * 100_000, '[3,"1",' + '{"a":' * 100_000 + "1" + "}" * 100_000 + "]"),
    # Calls whose id would have to be guessed.
    *(f'[2,"{spelt}","A"]' for spelt in ("", "\\u0041", "a\\n", "a\nb", 256 * "i")),
    *('[2,"","A",{}]', f'[2,"{256 * "i"}","A",{{}}]'),
]
DAMAGED_CALLS = [
    *('[2,ID,"A"]', '[2,ID,"A",1]', '[2,ID,"A",[]]', '[2,ID,"A",""]', "[2,ID,1,{}]", "[2,ID,null,{}]"),
    "[2,ID,",
    *('[2,ID,"A",{"a":1,}]', '[2,ID,"A",{a:1}]', "[2,ID,'A',{}]", '[2,ID,"A",{}]]', ' [ 2 , ID , "A" ]'),
    *('[2,ID,"A",{"a":NaN}]', '[2,ID,"A",{"a":Infinity}]', '[2,ID,"A",{"a":-Infinity}]'),
    *(f'[2,ID,"A",{{"a":{LONG}}}]', f'[2,ID,"A",{{"a":-{LONG}}}]', '[2,ID,"A",' + '{"a":' * 100_000),
    '[2,ID,"A",{"a":' + "[" * 100_000 + "]" * 100_000 + "}]",
]


@pytest.mark.parametrize("text", NO_MESSAGES)
def test_parse_malformed(text: str) -> None:
    """A text of another shape, that is no Call with an id, is an error without a message id."""
    error = refused(text)
    assert error.message_id is None
    assert 0 < len(str(error)) <= 200


@pytest.mark.parametrize("text", DAMAGED_CALLS)
@pytest.mark.parametrize("message_id", ["i", 17, p.MAX_MESSAGE_ID * "i"])
def test_parse_malformed_call_with_readable_id(text: str, message_id: p.MessageId) -> None:
    """A Call that cannot be read tells its id, so that it can be answered."""
    assert refused(text.replace("ID", json.dumps(message_id))).message_id == message_id
    assert refused('[2,"i"').message_id == refused('[2,"i"]').message_id == "i"


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
def test_parse_any_text(text: str) -> None:
    """For any text or JSON, or damaged message: Message or MessageError, never any other exception."""
    result = outcome(text)
    if isinstance(result, p.MessageError):
        assert result.message_id is None or str(result.message_id) in text
    else:
        assert (result.text, type(result.type), type(result.payload)) == (text, p.MessageType, dict)
        assert type(result.message_id) is int or 1 <= len(str(result.message_id)) <= p.MAX_MESSAGE_ID


def as_read(value: Any) -> Any:
    """Return a value as JSON gives it back."""
    return json.loads(json.dumps(value))


@settings(deadline=None)
@given(messages, spellings())
def test_parse_any_message(parts: tuple[Any, ...], spell: Callable[[Any], str]) -> None:
    """Every well-formed message is read as what it says, however it is spelt."""
    kind, message_id, *rest = parts
    text = spell(parts)
    action = "" if kind is CALLRESULT else rest[0]
    assert p.parse(text) == (kind, message_id, action, as_read(rest[-1]), text)


# Texts of the proxy's own.


def test_texts_of_the_proxy() -> None:
    """The proxy's own messages are compact ASCII, and read back."""
    assert p.call_text("1", "A", p.dump({"a": "\xe4"})) == '[2,"1","A",{"a":"\\u00e4"}]'
    assert p.result_text(1, "{}") == "[3,1,{}]"
    assert p.error_text("1", "GenericError", 300 * "x") == f'[4,"1","GenericError","{255 * "x"}",{{}}]'


# Patching.


def without(payload: dict[str, Any], path: list[str]) -> dict[str, Any]:
    """Return the payload without the value at the path."""
    key, *rest = path
    others = {name: value for name, value in payload.items() if name != key}
    return {**others, key: without(payload[key], rest)} if rest else others


SPACED = ' [ 2 , "1" , "A" ,\n { "a" : [ 1 , { "b" : "x" } ] ,\t"b" : { "a" : { } , "c" : -1.50e3 } } ] '


@pytest.mark.parametrize(
    ("text", "path", "found"),
    [
        *((SPACED, (), SPACED.strip()), (SPACED, (0,), "2"), (SPACED, (1,), '"1"'), (SPACED, (4,), "")),
        *((SPACED, (3, "a"), '[ 1 , { "b" : "x" } ]'), (SPACED, (3, "a", 0), "1"), (SPACED, (3, "c"), "")),
        *((SPACED, (3, "a", 1, "b"), '"x"'), (SPACED, (3, "b", "a"), "{ }"), (SPACED, (3, "a", 2), "")),
        *((SPACED, (3, "b", "c"), "-1.50e3"), (SPACED, (3, "a", "b"), ""), (SPACED, (3, 0), "")),
        (SPACED, (3, "b", "c", "d"), ""),
        *(('[2,"1","A",{"a":1,"a":2}]', (3, "a"), "2"), ('[2,"1","A",{"\\u0061":1,"a":2}]', (3, "a"), "2")),
        *(('[2,"1","A",{"]}\\"":"}]\\"","a":3}]', (3, "a"), "3"), ('[2,"1","A",null]', (3, "a"), "")),
        ('[2,"1","A",{"x\ny":1,"a":4}]', (3, "a"), "4"),
    ],
)
def test_value_text(text: str, path: p.TextPath, found: str) -> None:
    """A value is found as it stands; keys are told apart as a JSON reader does; the last of two counts."""
    assert p.value_text(text, path) == found


@pytest.mark.parametrize(
    ("payload", "twice"),
    [
        *(('{"a":1}', False), ('{"a":1,"a":1}', True), ('{"a":1,"\\u0061":2}', True)),
        *(('{"b":{"a":1},"a":2}', False), ('{"b":[{"a":1,"a":2}]}', True), ("null", False)),
    ],
)
def test_has_repeated_key(payload: str, twice: bool) -> None:
    """A key that stands twice in its object is noticed, however it is spelt and wherever it is."""
    assert p.has_repeated_key(f'[2,"1","A",{payload}]') is twice


@pytest.mark.parametrize(
    ("text", "path", "value", "patched"),
    [
        ('[2,"1","A",{"a": 1.10 ,"b":1E400}]', (3, "a"), 7, '[2,"1","A",{"a": 7 ,"b":1E400}]'),
        ('[2,"1","A",{"a":{"b":[]}}]', (3, "a"), "x", '[2,"1","A",{"a":"x"}]'),
        ('[2,"1","A",{"a":1}]', (3, "a"), "\xe4\n\ud800", '[2,"1","A",{"a":"\\u00e4\\n\\ud800"}]'),
        ('[2,"1","A",{"a":1,"a":2}]', (3, "a"), 3, '[2,"1","A",{"a":1,"a":3}]'),
        ('[2,"1","A",{"a":[{"b":1},{"b":2}]}]', (3, "a", 1, "b"), 3, '[2,"1","A",{"a":[{"b":1},{"b":3}]}]'),
        ('[2,"1","A",{"b":1}]', (3, "a"), 3, '[2,"1","A",{"a":3,"b":1}]'),
        ('[2,"1","A",{ "b":1}]', (3, "a"), 3, '[2,"1","A",{"a":3, "b":1}]'),
        ('[2,"1","A",{"b":{"c":1}}]', (3, "b", "a"), 3, '[2,"1","A",{"b":{"a":3,"c":1}}]'),
        ('[2,"1","A",{}]', (3, "a"), 3, '[2,"1","A",{"a":3}]'),
        ('[2,"1","A", { } ]', (3, "a"), "x", '[2,"1","A", {"a":"x" } ]'),
        ('[2,"1","A", null ]', (3, "a"), 3, '[2,"1","A", {"a":3} ]'),
        ('[3,"1",null]', (2, "a"), 3, '[3,"1",{"a":3}]'),
    ],
)
def test_patch(text: str, path: p.TextPath, value: str | int, patched: str) -> None:
    """One value is replaced, or added as its object's first key; every other character stands."""
    assert p.patch(text, path, value) == patched


@settings(deadline=None)
@given(messages, spellings(), st.lists(keys, min_size=1, max_size=4), st.text() | st.integers(), st.data())
def test_patch_any_value(
    parts: tuple[Any, ...],
    spell: Callable[[Any], str],
    path: list[str],
    value: str | int,
    data: st.DataObject,
) -> None:
    """Patching one value of a message changes that value and no other character."""
    marked: Any = MARK
    for key in reversed(path):
        marked = {**data.draw(payloads), key: marked}
    head, tail = spell((*parts[:-1], marked)).split(p.dump(MARK))
    patched = p.patch(f'{head}"04A1"{tail}', (len(parts) - 1, *path), value)
    assert patched == head + p.dump(value) + tail
    payload = p.parse(patched).payload
    assert p.value_at(payload, tuple(path)) == value
    assert without(payload, path) == without(as_read(marked), path)


@settings(deadline=None)
@given(messages, spellings(), st.text() | st.integers())
def test_patch_any_missing_key(parts: tuple[Any, ...], spell: Callable[[Any], str], value: str | int) -> None:
    """A missing key becomes the payload's first, and no other character changes."""
    payload = {key: item for key, item in parts[-1].items() if key != "missing"}
    head, tail = spell((*parts[:-1], MARK)).split(p.dump(MARK))
    text = head + spell(payload) + tail
    patched = p.patch(text, (len(parts) - 1, "missing"), value)
    added = f'"missing":{p.dump(value)}{"," if payload else ""}'
    assert patched == f"{head}{{{added}{spell(payload)[1:]}{tail}"
    assert p.parse(patched).payload == {"missing": value, **as_read(payload)}
    assert next(iter(p.parse(patched).payload)) == "missing"


@settings(deadline=None)
@given(messages, spellings(), blanks, st.text(min_size=1, max_size=36))
def test_with_message_id_any_message(
    parts: tuple[Any, ...], spell: Callable[[Any], str], around: str, message_id: str
) -> None:
    """Another message id changes the message id and no other character."""
    head, tail = (around + spell((parts[0], MARK, *parts[2:])) + around).split(p.dump(MARK), 1)
    text = p.patch(head + spell(parts[1]) + tail, (1,), message_id)
    assert text == head + p.dump(message_id) + tail
    assert p.parse(text) == (parts[0], message_id, *p.parse(head + spell(parts[1]) + tail)[2:4], text)

use proptest::prelude::*;
use serde_json::json;

use super::*;

const MOST: Limits = Limits::REQUEST;

/// Every message in `bytes`, which come in pieces of `sizes` (over and over).
fn read(bytes: &[u8], sizes: &[usize]) -> Vec<Result<Value, String>> {
    let mut reader = Reader::new(MOST);
    let mut messages = Vec::new();
    let (mut rest, mut sizes) = (bytes, sizes.iter().cycle());
    while !rest.is_empty() {
        let size = (*sizes.next().expect("a cycle")).clamp(1, rest.len());
        let (mut piece, behind) = rest.split_at(size);
        rest = behind;
        while let Some(message) = reader.next(&mut piece) {
            messages.push(message.map_err(|error| error.to_string()));
        }
        assert!(piece.is_empty(), "everything is taken where no message ends");
    }
    messages
}

fn at_once(bytes: impl AsRef<[u8]>) -> Vec<Result<Value, String>> {
    read(bytes.as_ref(), &[usize::MAX])
}

fn error(text: &str) -> Result<Value, String> {
    Err(format!("JSON parse error, {text}"))
}

#[test]
fn values_need_nothing_between_them() {
    assert_eq!(
        at_once(r#"{"a":1}{"b":[]} [] "x"{}"#),
        [Ok(json!({"a": 1})), Ok(json!({"b": []})), Ok(json!([])), Ok(json!("x")), Ok(json!({})),]
    );
    // A word and a number end with what follows them.
    assert_eq!(at_once("null 12"), [Ok(Value::Null)]);
    assert_eq!(at_once("nulltrue{}"), [error("invalid keyword 'nulltrue'"), Ok(json!({}))]);
}

#[test]
fn strings() {
    let good: [(&str, &str); 7] = [
        (r#""a/b\/\n\u0001""#, "a/b/\n\u{1}"),
        (r#"'it\'s "q"'"#, "it's \"q\""),
        (r#""it's""#, "it's"),
        (r#""\u00e9\ud834\udd1e""#, "\u{e9}\u{1d11e}"),
        (r#""\b\f\r\t\\""#, "\u{8}\u{c}\r\t\\"),
        ("\"\u{7f}\u{fc}\"", "\u{7f}\u{fc}"),
        (r#""\u0000""#, "\0"),
    ];
    for (written, meant) in good {
        assert_eq!(at_once(format!("[{written}]")), [Ok(json!([meant]))], "{written}");
    }
    let bad: [(&[u8], &str); 9] = [
        (br#""\x""#, "invalid escape sequence in string"),
        (br#""\ud834""#, r"\ud834 is not a valid Unicode character"),
        (br#""\udd1e""#, r"\udd1e is not a valid Unicode character"),
        (br#""\ud834\u0041""#, r"\ud834 is not a valid Unicode character"),
        (br#""\ud834\n""#, r"\ud834 is not a valid Unicode character"),
        (br#""\u12""#, r#"\u12" is not a valid Unicode character"#),
        (b"\"\xed\xa0\x80\"", "invalid UTF-8 sequence in string"),
        (b"\"\xe2\x82\"", "invalid UTF-8 sequence in string"),
        (b"\"\xf4\x90\x80\x80\"", "invalid UTF-8 sequence in string"),
    ];
    for (written, why) in bad {
        let message = [b"[", written, b"]{}"].concat();
        assert_eq!(at_once(&message), [error(why), Ok(json!({}))], "{written:?}");
    }
}

#[test]
fn numbers() {
    for (written, meant) in [
        ("0", json!(0)),
        ("-0", json!(0)),
        ("-9223372036854775808", json!(i64::MIN)),
        ("18446744073709551615", json!(u64::MAX)),
        ("123456789012345678901234567890", json!(1.234_567_890_123_456_8e29)),
        ("1.5", json!(1.5)),
        ("1E5", json!(1e5)),
        ("2e-2", json!(0.02)),
    ] {
        assert_eq!(at_once(format!("[{written}]")), [Ok(json!([meant]))], "{written}");
    }
    for (written, errors) in [
        // The byte that makes no sense belongs to the mistake; what follows is passed over up to the next mark.
        ("[01]", vec![error("stray '01'"), error("expecting value")]),
        ("[+1]", vec![error("stray '+'"), error("expecting value")]),
        ("[.5]", vec![error("stray '.'"), error("expecting value")]),
        ("[-]", vec![error("stray '-]'")]),
        ("[1.]", vec![error("stray '1.]'")]),
        ("[1e]", vec![error("stray '1e]'")]),
        ("[0x10]", vec![error("expected separator in list")]),
        ("[1e400]", vec![error("number out of range '1e400'")]),
    ] {
        assert_eq!(at_once(written), errors, "{written}");
    }
}

#[test]
fn mistakes_end_with_their_message() {
    for (written, why) in [
        (r#"{"a":1,}"#, "expecting value"),
        ("}", "expecting value"),
        (r#"{"a" 1}"#, "missing : in object pair"),
        (r#"{"a"}"#, "missing : in object pair"),
        (r#"{"a":}"#, "expecting value"),
        (r#"{"a":1 "b":2}"#, "expected separator in dict"),
        ("[1 2]", "expected separator in list"),
        ("[1,2}", "expected separator in list"),
        ("[1,]", "expecting value"),
        ("{,}", "expecting value"),
        ("{1:2}", "key is not a string in object"),
        (r#"{"a":1,"a":2}"#, "duplicate key"),
        ("[nan]", "invalid keyword 'nan'"),
        ("[tru\ne]", "invalid keyword 'tru'"),
    ] {
        assert_eq!(at_once(format!("{written}{{}}")), [error(why), Ok(json!({}))], "{written}");
    }
}

#[test]
fn stray_bytes_are_told_and_left_behind() {
    let twice = |what: &str| vec![error(&format!("stray '{what}'")), error("expecting value")];
    assert_eq!(at_once("[TRUE]"), twice("T"));
    assert_eq!(at_once("[%d]"), twice("%"));
    assert_eq!(at_once("[\"abc\u{1}def\"]"), twice("\"abc\u{1}"));
    assert_eq!(at_once("[\"a\nb\"]"), twice("\"a\n"));
    assert_eq!(at_once(b"[\"\xff\"]"), twice("\"\u{fffd}"));
    // Blanks do not end the recovery.
    assert_eq!(at_once("[01 \"x\"]"), twice("01"));
    assert_eq!(at_once("[01\t\"x\"]"), twice("01"));
    // Half a message, and the documented way out of it.
    for way_out in [&b"\x1b"[..], b"\xff", b"\xfe", b"\0"] {
        let message = [br#"{"a":[1,"#, way_out, br#"{"b":1}"#].concat();
        let messages = at_once(&message);
        assert_eq!(messages.len(), 2, "{messages:?}");
        assert!(messages[0].as_ref().is_err_and(|why| why.contains("stray")), "{messages:?}");
        assert_eq!(messages[1], Ok(json!({"b": 1})));
    }
    // Braces and brackets are counted apart, and a brace does not close a bracket.
    assert_eq!(at_once(r#"{"a":[1,2}"#), []);
}

#[test]
fn limits_hold_and_the_next_message_is_understood() {
    let nested = |depth: usize| format!("{}{}", "[".repeat(depth), "]".repeat(depth));
    let mut messages = at_once(nested(MAX_DEPTH));
    assert!(messages.len() == 1 && messages.remove(0).is_ok());
    let messages = at_once(format!("{}{{}}", nested(MAX_DEPTH + 1)));
    assert_eq!(messages[0], Err("JSON nesting depth limit exceeded".into()));
    assert_eq!(messages.last(), Some(&Ok(json!({}))));

    let fits = format!("[\"{}\"]", "a".repeat(MOST.bytes - 4));
    assert!(at_once(&fits)[0].is_ok());
    let long = format!("[\"{}\"]\n{{}}", "a".repeat(MOST.bytes));
    let messages = at_once(&long);
    assert_eq!(messages[0], Err("JSON token size limit exceeded".into()));
    assert_eq!(messages.last(), Some(&Ok(json!({}))));

    let many = |tokens: usize| format!("[{}1]", "1,".repeat((tokens - 3) / 2));
    assert!(at_once(many(MOST.tokens - 1))[0].is_ok());
    let messages = at_once(format!("{}\n{{}}", many(MOST.tokens + 101)));
    assert_eq!(messages[0], Err("JSON token count limit exceeded".into()));
    assert_eq!(messages.last(), Some(&Ok(json!({}))));
}

#[test]
fn what_was_collected_is_dropped_at_a_limit() {
    let mut reader = Reader::new(MOST);
    let endless = vec![b'a'; 3 * MOST.bytes];
    let mut rest = &endless[..];
    assert!(reader.next(&mut rest).is_some_and(|message| message.is_err()));
    assert!(reader.next(&mut rest).is_none() && rest.is_empty());
    assert_eq!((reader.tokens.capacity(), reader.lexer.pending()), (0, 0));
}

/// Any value whose numbers JSON tells apart.
fn values() -> impl Strategy<Value = Value> {
    let leaf = prop_oneof![
        Just(Value::Null),
        any::<bool>().prop_map(Value::from),
        any::<i64>().prop_map(Value::from),
        any::<u64>().prop_map(Value::from),
        ".*".prop_map(Value::from),
    ];
    leaf.prop_recursive(5, 60, 6, |inner| {
        prop_oneof![
            prop::collection::vec(inner.clone(), 0..6).prop_map(Value::from),
            prop::collection::btree_map(".{0,4}", inner, 0..6).prop_map(|map| json!(map)),
        ]
    })
}

/// Bytes that look like JSON often enough to get somewhere.
fn almost_json() -> impl Strategy<Value = Vec<u8>> {
    let pieces = prop_oneof![
        4 => prop::sample::select(&b"{}[]:,\"'\\ \n01-.eE"[..]).prop_map(|byte| vec![byte]),
        2 => prop::sample::select(&["\"a\"", "true", "null", "\\u0041", "12", "{\"a\":", "}", "]"][..])
            .prop_map(|text| text.as_bytes().to_vec()),
        1 => any::<u8>().prop_map(|byte| vec![byte]),
    ];
    prop::collection::vec(pieces, 0..60).prop_map(|pieces| pieces.concat())
}

proptest! {
    #[test]
    fn what_is_written_is_read(values in prop::collection::vec(values(), 1..4), sizes in prop::collection::vec(1_usize..9, 1..9)) {
        let text: String = values.iter().map(|value| format!("{value} ")).collect();
        let messages: Vec<_> = read(text.as_bytes(), &sizes).into_iter().collect::<Result<_, _>>().expect("JSON");
        prop_assert_eq!(messages, values);
    }

    #[test]
    fn pieces_do_not_matter(bytes in almost_json(), sizes in prop::collection::vec(1_usize..9, 1..9)) {
        prop_assert_eq!(read(&bytes, &sizes), at_once(&bytes));
    }

    #[test]
    fn what_is_accepted_is_json(bytes in almost_json()) {
        // But for single quotes, another parser agrees on what was accepted as a whole.
        if let [Ok(value)] = &at_once(&bytes)[..]
            && !bytes.contains(&b'\'')
            && let Ok(theirs) = serde_json::from_slice::<Value>(&bytes)
        {
            prop_assert_eq!(value, &theirs);
        }
    }
}

//! A stream of bytes to JSON values.
//!
//! # Model
//! Tokens are collected until braces and brackets are even (counted apart, so `{"a":[1}` is not over yet), then made into a value at
//! once. Whatever is wrong with them is the error of that one message; the next one begins behind it.
//!
//! # Limits
//! A message has at most the bytes and tokens of its [`Limits`], and [`MAX_DEPTH`]. A value takes at most some hundred bytes for each token,
//! so memory is bounded by these. What goes beyond is an error at once, and what was collected is dropped.

use std::fmt;

use serde_json::{Map, Number, Value};

use super::lexer::{Lexer, Taken, Token};

/// Most braces and brackets that are open at a time.
pub const MAX_DEPTH: usize = 1024;

/// How large one message may be.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Limits {
    /// Most bytes.
    pub bytes: usize,
    /// Most tokens.
    pub tokens: usize,
}

impl Limits {
    /// Of what is asked for: a command and its arguments.
    pub const REQUEST: Self = Self { bytes: 1 << 20, tokens: 1 << 15 };
    /// Of what a daemon tells. Nothing is as long as the answer to `query-named-block-nodes`: these are 24 KiB and 512 tokens for each
    /// of 1,024 nodes, where ours tells about 100 tokens of a node, QEMU's some more, and both the path of its file twice.
    pub const REPLY: Self = Self { bytes: 24 << 20, tokens: 1 << 19 };
}

/// Why a message is none.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct SyntaxError(String);

impl fmt::Display for SyntaxError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.0)
    }
}

fn wrong(what: impl fmt::Display) -> SyntaxError {
    SyntaxError(format!("JSON parse error, {what}"))
}

/// See the module's header.
#[derive(Debug)]
pub struct Reader {
    limits: Limits,
    lexer: Lexer,
    tokens: Vec<Token>,
    /// Bytes of the message so far.
    bytes: usize,
    braces: isize,
    brackets: isize,
}

impl Reader {
    /// At the beginning of a stream of messages that keep to `limits`.
    #[must_use]
    pub fn new(limits: Limits) -> Self {
        Self { limits, lexer: Lexer::new(), tokens: Vec::new(), bytes: 0, braces: 0, brackets: 0 }
    }

    /// Bytes of memory that the message so far takes, spare room included.
    #[must_use]
    pub fn heap_bytes(&self) -> usize {
        // What stands in tokens is no more than was sent of them, and has no spare room.
        self.tokens.capacity() * size_of::<Token>() + self.bytes + self.lexer.heap_bytes()
    }

    /// Take bytes off the front of `input` up to the end of a message, and give that; `None`: all of it was taken, and the message goes on.
    pub fn next(&mut self, input: &mut &[u8]) -> Option<Result<Value, SyntaxError>> {
        while let Some((&byte, rest)) = input.split_first() {
            let token = match self.lexer.take(byte) {
                Taken::Byte(token) => {
                    *input = rest;
                    // Blanks between messages are no part of any.
                    self.bytes += usize::from(!self.tokens.is_empty() || self.lexer.pending() > 0);
                    token
                }
                Taken::Again(token) => Some(token),
            };
            let message = match token {
                Some(token) => self.collect(token),
                None => None,
            };
            if message.is_some() {
                self.start_over();
                return message;
            }
            if self.bytes > self.limits.bytes {
                self.start_over();
                self.lexer.recover();
                return Some(Err(SyntaxError("JSON token size limit exceeded".into())));
            }
        }
        None
    }

    fn collect(&mut self, token: Token) -> Option<Result<Value, SyntaxError>> {
        match &token {
            Token::Mark(b'{') => self.braces += 1,
            Token::Mark(b'}') => self.braces -= 1,
            Token::Mark(b'[') => self.brackets += 1,
            Token::Mark(b']') => self.brackets -= 1,
            Token::Stray(bytes) => {
                let text = String::from_utf8_lossy(bytes);
                return Some(Err(wrong(format_args!("stray '{text}'"))));
            }
            Token::Mark(_) | Token::Text(_) | Token::Number(_) | Token::Word(_) => {}
        }
        self.tokens.push(token);
        let open = |count: isize| usize::try_from(count).unwrap_or(0);
        if open(self.braces) + open(self.brackets) > MAX_DEPTH {
            return Some(Err(SyntaxError("JSON nesting depth limit exceeded".into())));
        }
        if self.tokens.len() > self.limits.tokens {
            self.lexer.recover();
            return Some(Err(SyntaxError("JSON token count limit exceeded".into())));
        }
        let goes_on = self.braces >= 0 && self.brackets >= 0 && (self.braces > 0 || self.brackets > 0);
        if goes_on { None } else { Some(value_of(std::mem::take(&mut self.tokens))) }
    }

    /// The lexer goes on where it is.
    fn start_over(&mut self) {
        self.tokens = Vec::new();
        (self.bytes, self.braces, self.brackets) = (0, 0, 0);
    }
}

/// The value that `tokens` are.
fn value_of(tokens: Vec<Token>) -> Result<Value, SyntaxError> {
    let mut tokens = Tokens(tokens.into_iter().peekable());
    tokens.value()
}

struct Tokens(std::iter::Peekable<std::vec::IntoIter<Token>>);

impl Tokens {
    fn take(&mut self) -> Result<Token, SyntaxError> {
        self.0.next().ok_or_else(|| wrong("premature end of input"))
    }

    /// Takes the next token if it is `mark`.
    fn takes(&mut self, mark: u8) -> bool {
        self.0.next_if_eq(&Token::Mark(mark)).is_some()
    }

    /// As deep as braces and brackets are, so [`MAX_DEPTH`] at most.
    fn value(&mut self) -> Result<Value, SyntaxError> {
        match self.take()? {
            Token::Mark(b'{') => self.object(),
            Token::Mark(b'[') => self.array(),
            Token::Text(bytes) => text(&bytes).map(Value::String),
            Token::Number(digits) => number(&digits),
            Token::Word(word) => match word.as_str() {
                "null" => Ok(Value::Null),
                "true" => Ok(Value::Bool(true)),
                "false" => Ok(Value::Bool(false)),
                _ => Err(wrong(format_args!("invalid keyword '{word}'"))),
            },
            Token::Mark(_) | Token::Stray(_) => Err(wrong("expecting value")),
        }
    }

    fn object(&mut self) -> Result<Value, SyntaxError> {
        let mut members = Map::new();
        if self.takes(b'}') {
            return Ok(Value::Object(members));
        }
        loop {
            let Value::String(key) = self.value()? else {
                return Err(wrong("key is not a string in object"));
            };
            if self.take()? != Token::Mark(b':') {
                return Err(wrong("missing : in object pair"));
            }
            let value = self.value()?;
            if members.insert(key, value).is_some() {
                return Err(wrong("duplicate key"));
            }
            match self.take()? {
                Token::Mark(b'}') => return Ok(Value::Object(members)),
                Token::Mark(b',') => {}
                _ => return Err(wrong("expected separator in dict")),
            }
        }
    }

    fn array(&mut self) -> Result<Value, SyntaxError> {
        let mut values = Vec::new();
        if self.takes(b']') {
            return Ok(Value::Array(values));
        }
        loop {
            values.push(self.value()?);
            match self.take()? {
                Token::Mark(b']') => return Ok(Value::Array(values)),
                Token::Mark(b',') => {}
                _ => return Err(wrong("expected separator in list")),
            }
        }
    }
}

/// A whole number where it fits one, else a fraction.
fn number(digits: &str) -> Result<Value, SyntaxError> {
    if let Ok(number) = digits.parse::<i64>() {
        return Ok(number.into());
    }
    if let Ok(number) = digits.parse::<u64>() {
        return Ok(number.into());
    }
    let number = digits.parse().ok().and_then(Number::from_f64);
    number.map(Value::Number).ok_or_else(|| wrong(format_args!("number out of range '{digits}'")))
}

/// What a string with its quotes says.
fn text(bytes: &[u8]) -> Result<String, SyntaxError> {
    let inner = &bytes[1..bytes.len() - 1];
    let inner = std::str::from_utf8(inner).map_err(|_| wrong("invalid UTF-8 sequence in string"))?;
    let mut text = String::with_capacity(inner.len());
    let mut rest = inner.chars();
    while let Some(letter) = rest.next() {
        if letter != '\\' {
            text.push(letter);
            continue;
        }
        text.push(match rest.next() {
            Some(letter @ ('"' | '\'' | '\\' | '/')) => letter,
            Some('b') => '\u{8}',
            Some('f') => '\u{c}',
            Some('n') => '\n',
            Some('r') => '\r',
            Some('t') => '\t',
            Some('u') => unicode(&mut rest, char::from(bytes[0]))?,
            _ => return Err(wrong("invalid escape sequence in string")),
        });
    }
    Ok(text)
}

/// What stands behind `\u` in a string between `quote`s: four digits, or a pair of them.
fn unicode(rest: &mut std::str::Chars<'_>, quote: char) -> Result<char, SyntaxError> {
    let written = rest.as_str();
    let invalid = || {
        let shown: String = written.chars().chain([quote]).take(4).collect();
        wrong(format_args!("\\u{shown} is not a valid Unicode character"))
    };
    let first = four_digits(rest).ok_or_else(invalid)?;
    if !(0xd800..0xdc00).contains(&first) {
        return char::from_u32(first).ok_or_else(invalid);
    }
    if !(rest.next() == Some('\\') && rest.next() == Some('u')) {
        return Err(invalid());
    }
    let second = four_digits(rest).filter(|second| (0xdc00..0xe000).contains(second)).ok_or_else(invalid)?;
    char::from_u32(0x10000 + ((first - 0xd800) << 10) + (second - 0xdc00)).ok_or_else(invalid)
}

fn four_digits(rest: &mut std::str::Chars<'_>) -> Option<u32> {
    let mut number = 0;
    for _ in 0..4 {
        number = number << 4 | rest.next()?.to_digit(16)?;
    }
    Some(number)
}

#[cfg(test)]
#[path = "parser_tests.rs"]
mod tests;

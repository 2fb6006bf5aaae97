//! Bytes to tokens, one byte at a time.
//!
//! # Model
//! The tokens of JSON, with two liberties that clients of QMP take: strings may stand in single quotes, and nothing needs to stand
//! between two values. What a string holds is looked at later, by the parser; here only its end is found.
//!
//! # Errors
//! A byte that fits nowhere makes what was read of the token an error, *stray*. From then on bytes are passed over up to a
//! structural character, a control character, or a byte that no UTF-8 has (0xFE, 0xFF). So a client that has lost its way sends one of
//! the latter two and is understood again: the documented way out of half a message.

/// A token.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) enum Token {
    /// One of `{}[]:,`.
    Mark(u8),
    /// A string as it was written, with its quotes.
    Text(Vec<u8>),
    /// A number as it was written.
    Number(String),
    /// A run of small letters.
    Word(String),
    /// What fits nowhere.
    Stray(Vec<u8>),
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum State {
    Between,
    Text { quote: u8, escaped: bool },
    Number(NumberState),
    Word,
    Recovering,
}

/// What a number has so far.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum NumberState {
    Minus,
    Zero,
    Digits,
    Point,
    Fraction,
    Exponent,
    ExponentSign,
    ExponentDigits,
}

/// See the module's header.
#[derive(Debug)]
pub(super) struct Lexer {
    state: State,
    /// Of the token that has begun.
    bytes: Vec<u8>,
}

/// What became of a byte.
pub(super) enum Taken {
    /// It was taken; a token may have ended with it.
    Byte(Option<Token>),
    /// A token ended before it; it is to be offered again.
    Again(Token),
}

impl Lexer {
    pub(super) fn new() -> Self {
        Self { state: State::Between, bytes: Vec::new() }
    }

    /// Bytes of the token that has begun.
    pub(super) fn pending(&self) -> usize {
        self.bytes.len()
    }

    pub(super) fn heap_bytes(&self) -> usize {
        self.bytes.capacity()
    }

    /// Forget the token that has begun.
    pub(super) fn reset(&mut self) {
        self.bytes = Vec::new();
        self.state = State::Between;
    }

    /// Pass over what belongs to a message that was given up.
    pub(super) fn recover(&mut self) {
        self.reset();
        self.state = State::Recovering;
    }

    /// Take `byte`.
    pub(super) fn take(&mut self, byte: u8) -> Taken {
        match self.state {
            State::Between => Taken::Byte(self.begin(byte)),
            State::Recovering => {
                let ends = matches!(byte, b'{' | b'}' | b'[' | b']' | b':' | b',' | 0xfe | 0xff)
                    || byte < b' ' && byte != b'\t';
                if !ends {
                    return Taken::Byte(None);
                }
                self.state = State::Between;
                Taken::Byte(self.begin(byte))
            }
            State::Text { quote, escaped } => Taken::Byte(self.take_text(byte, quote, escaped)),
            State::Word if byte.is_ascii_lowercase() => {
                self.bytes.push(byte);
                Taken::Byte(None)
            }
            State::Word => {
                self.state = State::Between;
                Taken::Again(Token::Word(self.take_ascii()))
            }
            State::Number(state) => match next_of_number(state, byte) {
                Next::State(state) => {
                    self.bytes.push(byte);
                    self.state = State::Number(state);
                    Taken::Byte(None)
                }
                Next::End => {
                    self.state = State::Between;
                    Taken::Again(Token::Number(self.take_ascii()))
                }
                Next::Stray => {
                    self.bytes.push(byte);
                    Taken::Byte(Some(self.stray()))
                }
            },
        }
    }

    fn begin(&mut self, byte: u8) -> Option<Token> {
        match byte {
            b' ' | b'\t' | b'\n' | b'\r' => return None,
            b'{' | b'}' | b'[' | b']' | b':' | b',' => return Some(Token::Mark(byte)),
            b'"' | b'\'' => self.state = State::Text { quote: byte, escaped: false },
            b'-' => self.state = State::Number(NumberState::Minus),
            b'0' => self.state = State::Number(NumberState::Zero),
            b'1'..=b'9' => self.state = State::Number(NumberState::Digits),
            b'a'..=b'z' => self.state = State::Word,
            _ => {
                self.bytes.push(byte);
                return Some(self.stray());
            }
        }
        self.bytes.push(byte);
        None
    }

    fn take_text(&mut self, byte: u8, quote: u8, escaped: bool) -> Option<Token> {
        self.bytes.push(byte);
        if !(b' '..0xfe).contains(&byte) {
            return Some(self.stray());
        }
        if byte == quote && !escaped {
            self.state = State::Between;
            return Some(Token::Text(std::mem::take(&mut self.bytes)));
        }
        self.state = State::Text { quote, escaped: byte == b'\\' && !escaped };
        None
    }

    fn stray(&mut self) -> Token {
        self.state = State::Recovering;
        Token::Stray(std::mem::take(&mut self.bytes))
    }

    /// What was taken, of which every byte is ASCII.
    fn take_ascii(&mut self) -> String {
        String::from_utf8(std::mem::take(&mut self.bytes)).expect("digits, signs and letters only")
    }
}

enum Next {
    State(NumberState),
    End,
    Stray,
}

fn next_of_number(state: NumberState, byte: u8) -> Next {
    use NumberState::{Digits, Exponent, ExponentDigits, ExponentSign, Fraction, Minus, Point, Zero};
    Next::State(match (state, byte) {
        (Minus, b'0') => Zero,
        (Minus, b'1'..=b'9') | (Digits, b'0'..=b'9') => Digits,
        (Zero | Digits, b'.') => Point,
        (Point | Fraction, b'0'..=b'9') => Fraction,
        (Zero | Digits | Fraction, b'e' | b'E') => Exponent,
        (Exponent, b'+' | b'-') => ExponentSign,
        (Exponent | ExponentSign | ExponentDigits, b'0'..=b'9') => ExponentDigits,
        (Minus | Point | Exponent | ExponentSign, _) | (Zero, b'0'..=b'9') => return Next::Stray,
        (Zero | Digits | Fraction | ExponentDigits, _) => return Next::End,
    })
}

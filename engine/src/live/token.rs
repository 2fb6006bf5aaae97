//! Tokens of the operations on an engine's ring: whose it is in the upper half, its owner's own number in the lower.

use super::DiskId;
use crate::ring::Token;

/// Whose operation a token names.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Owner {
    Disk(DiskId),
    Job(usize),
    /// A listener of exports.
    Listener(usize),
    /// A client of exports.
    Client(usize),
}

const KIND_SHIFT: u32 = 62;
const OWNER_SHIFT: u32 = 32;
const LOCAL: u64 = (1 << OWNER_SHIFT) - 1;
const NUMBER: u64 = (1 << (KIND_SHIFT - OWNER_SHIFT)) - 1;

pub(super) fn token_of(owner: Owner, local: Token) -> Token {
    assert!(local.0 <= LOCAL, "{local:?} of {owner:?}");
    let (kind, number) = match owner {
        Owner::Disk(id) => (0, id.0),
        Owner::Job(index) => (1, index as u64),
        Owner::Listener(index) => (2, index as u64),
        Owner::Client(index) => (3, index as u64),
    };
    assert!(number <= NUMBER, "{owner:?}");
    Token(kind << KIND_SHIFT | number << OWNER_SHIFT | local.0)
}

pub(super) fn owner_of(token: Token) -> (Owner, Token) {
    let number = token.0 >> OWNER_SHIFT & NUMBER;
    let index = usize::try_from(number).expect("30 bits");
    let owner = match token.0 >> KIND_SHIFT {
        0 => Owner::Disk(DiskId(number)),
        1 => Owner::Job(index),
        2 => Owner::Listener(index),
        _ => Owner::Client(index),
    };
    (owner, Token(token.0 & LOCAL))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_token_tells_whose_it_is() {
        let owners = [
            Owner::Disk(DiskId(0)),
            Owner::Disk(DiskId(NUMBER)),
            Owner::Job(0),
            Owner::Job(7),
            Owner::Listener(1),
            Owner::Client(1023),
        ];
        for owner in owners {
            for local in [0, 1, LOCAL] {
                assert_eq!(owner_of(token_of(owner, Token(local))), (owner, Token(local)));
            }
        }
    }
}

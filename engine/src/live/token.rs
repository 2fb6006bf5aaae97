//! Tokens of the operations on an engine's ring: whose it is in the upper half, its owner's own number in the lower.

use super::DiskId;
use crate::ring::Token;

/// Whose operation a token names.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Owner {
    Disk(DiskId),
    Job(usize),
}

const JOB_BIT: u64 = 1 << 63;
const OWNER_SHIFT: u32 = 32;
const LOCAL: u64 = (1 << OWNER_SHIFT) - 1;

pub(super) fn token_of(owner: Owner, local: Token) -> Token {
    assert!(local.0 <= LOCAL, "{local:?} of {owner:?}");
    let (bit, number) = match owner {
        Owner::Disk(id) => (0, id.0),
        Owner::Job(index) => (JOB_BIT, index as u64),
    };
    assert!(number < 1 << 31, "{owner:?}");
    Token(bit | number << OWNER_SHIFT | local.0)
}

pub(super) fn owner_of(token: Token) -> (Owner, Token) {
    let number = (token.0 & !JOB_BIT) >> OWNER_SHIFT;
    let owner = if token.0 & JOB_BIT == 0 {
        Owner::Disk(DiskId(number))
    } else {
        Owner::Job(usize::try_from(number).expect("31 bits"))
    };
    (owner, Token(token.0 & LOCAL))
}

//! What arguments look like, as data: one table that checks them and that clients may ask for.
//!
//! What QEMU knows and we do not stands in the table too, marked as refused: it is told apart from what nobody knows, it is accepted
//! where it says what we do anyway (`compress: false`), and clients that look before they ask do not find it.

/// What a value may be.
#[derive(Clone, Copy, Debug)]
pub enum Kind {
    /// A string.
    Text,
    /// A whole number of 64 bits with a sign.
    Int,
    /// A whole number of 32 bits without a sign.
    UInt32,
    /// A truth value.
    Bool,
    /// One of some words.
    Word(&'static Words),
    /// An object.
    Object(&'static Object),
    /// An array.
    Array(&'static Kind),
    /// The name of a node, or an object that makes one.
    NodeOrName(&'static Object),
    /// Anything at all.
    Any,
}

/// Words to choose from.
#[derive(Debug)]
pub struct Words {
    /// The words.
    pub words: &'static [&'static str],
    /// Words that QEMU knows and we refuse.
    pub refused: &'static [&'static str],
}

/// A member of an object.
#[derive(Clone, Copy, Debug)]
pub struct Member {
    /// Its name.
    pub name: &'static str,
    /// What it may be.
    pub kind: Kind,
    /// Whether it must be there.
    pub required: bool,
    /// Known to QEMU and refused by us, but for values that ask for nothing.
    pub refused: Option<Harmless>,
}

/// Values of a member that is refused which may be given all the same.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Harmless {
    /// None.
    Nothing,
    /// That truth value.
    Bool(bool),
    /// That word.
    Word(&'static str),
}

/// What an object holds.
#[derive(Debug)]
pub struct Object {
    /// Always.
    pub members: &'static [Member],
    /// Besides, by the word in one of them.
    pub variants: Option<Variants>,
}

/// What an object holds besides, by the word in one of its members.
#[derive(Debug)]
pub struct Variants {
    /// The name of that member.
    pub tag: &'static str,
    /// For each word.
    pub cases: &'static [(&'static str, &'static Object)],
}

/// A command.
#[derive(Debug)]
pub struct Command {
    /// Its name.
    pub name: &'static str,
    /// Its arguments.
    pub arguments: &'static Object,
    /// What it returns.
    pub returns: Kind,
}

/// An event.
#[derive(Debug)]
pub struct Event {
    /// Its name.
    pub name: &'static str,
    /// Its data.
    pub data: &'static Object,
}

/// Nothing.
pub static EMPTY: Object = Object { members: &[], variants: None };

/// A member that must be there.
pub(super) const fn needs(name: &'static str, kind: Kind) -> Member {
    Member { name, kind, required: true, refused: None }
}

/// A member that may be left out.
pub(super) const fn may(name: &'static str, kind: Kind) -> Member {
    Member { name, kind, required: false, refused: None }
}

/// A member that QEMU knows and we refuse.
pub(super) const fn refuse(name: &'static str, kind: Kind, harmless: Harmless) -> Member {
    Member { name, kind, required: false, refused: Some(harmless) }
}

/// An object without variants.
pub(super) const fn object(members: &'static [Member]) -> Object {
    Object { members, variants: None }
}

/// Words of which none is refused.
pub(super) const fn words(words: &'static [&'static str]) -> Words {
    Words { words, refused: &[] }
}

//! Stub, replaced by its own commit.

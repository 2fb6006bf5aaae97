//! Stub.
/// Stub.
#[derive(Debug, Clone)]
pub struct Error;
impl Error {
    pub(crate) fn placeholder() -> Self {
        Self
    }
}
impl std::fmt::Display for Error {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str("x")
    }
}
impl std::error::Error for Error {}

//! `engine-cli`: copies disks and images.
fn main() {}

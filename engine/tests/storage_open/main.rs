//! Opening source, target and map file for real: what is refused, that what is refused is untouched, and what a prepared
//! target looks like. A wrong answer here overwrites somebody's disk.

mod devices;
mod files;
mod map;
mod resume;
mod support;

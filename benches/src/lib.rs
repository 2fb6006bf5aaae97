//! Benches live in `benches/`; the side-by-side runs of the whole program in `side-by-side/`.

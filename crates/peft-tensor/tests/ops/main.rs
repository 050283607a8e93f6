//! Every operation on the processor against plain f64 loops, and every gradient against central differences of
//! those loops, over random shapes.

mod attention;
mod check;
mod elementwise;
mod frozen;
mod layers;
mod matmul;
mod shape;
mod tape;
mod threads;

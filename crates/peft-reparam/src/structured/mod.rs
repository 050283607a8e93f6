//! Changes with a structure other than low rank.

pub mod fourierft;
pub mod krona;
pub mod loha;
pub mod lokr;

//! Single entries of weights.

pub mod child_tuning;
pub mod diff_pruning;
pub mod fish_mask;
pub mod lt_sft;
pub mod pafi;
pub mod shira;

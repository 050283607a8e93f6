//! peft-tensor's suite of operations, on the graphics card: linking the crate is what brings the device in.

use peft_wgpu as _;

#[path = "../../peft-tensor/tests/ops/attention.rs"]
mod attention;
#[path = "../../peft-tensor/tests/ops/check.rs"]
mod check;
#[path = "../../peft-tensor/tests/ops/elementwise.rs"]
mod elementwise;
#[path = "../../peft-tensor/tests/ops/frozen.rs"]
mod frozen;
#[path = "../../peft-tensor/tests/ops/layers.rs"]
mod layers;
#[path = "../../peft-tensor/tests/ops/matmul.rs"]
mod matmul;
#[path = "../../peft-tensor/tests/ops/shape.rs"]
mod shape;

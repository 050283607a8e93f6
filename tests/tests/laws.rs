//! The law suite over the methods of this repository.

peft_tests::law_suite!();

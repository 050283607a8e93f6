//! The method of this crate beside those of the repository, under the same laws and in the same command.

use custom_method as _;

peft_tests::law_suite!();

/// The registry has it, and its page is made like any other's.
#[test]
fn it_is_registered_and_documented() {
    let all = peft_core::methods();
    let ours = all
        .iter()
        .find(|m| m.id == "output_scale")
        .expect("registered");
    assert!(ours.file.ends_with("output_scale.rs"), "{}", ours.file);
    let page =
        xtask::method_page(ours, include_str!("../src/output_scale.rs")).expect("documented");
    assert!(
        page.contains("# Output scale") && page.contains("W' = diag(l) W"),
        "{page}"
    );
    assert!(all.len() > 5, "the repository's methods are there too");
}

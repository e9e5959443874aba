//! Keeps the module's code in memory after MODULE UNLOAD: a thread of a library
//! may still be on its way out then.

fn main() {
    println!("cargo::rerun-if-changed=build.rs");
    println!("cargo::rustc-link-arg-cdylib=-Wl,-z,nodelete");
}

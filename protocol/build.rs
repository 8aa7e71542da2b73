//! Generates messages and ttrpc services from the files in `proto/`.

use std::path::PathBuf;

use ttrpc_codegen::{Codegen, Customize, ProtobufCustomize};

fn main() {
    println!("cargo:rerun-if-changed=proto");
    let out_dir = PathBuf::from(std::env::var_os("OUT_DIR").expect("cargo sets OUT_DIR"));
    Codegen::new()
        .out_dir(&out_dir)
        .inputs([
            "proto/agent.proto",
            "proto/console.proto",
            "proto/cri.proto",
        ])
        .include("proto")
        .rust_protobuf()
        .rust_protobuf_customize(ProtobufCustomize::default().gen_mod_rs(false))
        .customize(Customize {
            async_all: true,
            ..Default::default()
        })
        .run()
        .expect("the files in proto compile");
    // The generated files carry inner attributes, which `include!` refuses: they
    // have to be modules of their own.
    std::fs::write(
        out_dir.join("mod.rs"),
        "pub mod agent;\npub mod agent_ttrpc;\npub mod console;\npub mod console_ttrpc;\npub mod cri;\n",
    )
    .expect("OUT_DIR is writable");
}

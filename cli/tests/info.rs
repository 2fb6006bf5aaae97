//! `info`: what is told about files and devices.

mod support;

use std::fs;
use std::process::Command;

use support::{code, dense, directory, json, run_in, sparse, stderr, stdout};

#[test]
fn a_file_in_words() {
    let there = directory();
    sparse(&there.path().join("a"), 64 << 20);
    let output = run_in(there.path(), &["info", "a"]);
    let text = stdout(&output);
    assert_eq!(code(&output), 0, "{}", stderr(&output));
    for part in
        ["size:", "64.0 MiB (67108864 bytes)", "allocated:", "direct I/O:", "io_uring:", "raw (as given"]
    {
        assert!(text.contains(part), "{part} in {text}");
    }
}

#[test]
fn a_file_as_json() {
    let there = directory();
    dense(&there.path().join("a"), 4099, 0);
    let object = json(&run_in(there.path(), &["info", "--json", "a"]));
    assert_eq!(object["length"], 4099);
    assert_eq!(object["kind"], "file");
    assert_eq!(object["format"], "raw");
    assert_eq!(object["exit_code"], 0);
    assert_eq!(object["allocated_bytes"], fs::metadata(there.path().join("a")).map(blocks).expect("stat"));
    assert!(object["io_uring"]["available"].is_boolean());
    assert_eq!(object["io_uring"]["available"] == true, object["io_uring"]["reason"].is_null());
}

/// It is a hint, never a guess: what is copied are the bytes as they are.
#[test]
fn contents_that_begin_like_an_image_are_hinted_at() {
    let there = directory();
    let hint = "the contents begin like a qcow2 image; it is treated as raw here";
    for (name, start, begins) in
        [("image", &b"QFI\xfb"[..], true), ("nearly", b"QFI\xfa", false), ("short", b"QFI", false)]
    {
        let mut bytes = start.to_vec();
        if name != "short" {
            bytes.resize(100_000, 7);
        }
        fs::write(there.path().join(name), &bytes).expect("written");
        let text = stdout(&run_in(there.path(), &["info", name]));
        assert_eq!(text.lines().filter(|line| line.contains(hint)).count(), usize::from(begins), "{text}");
        assert!(text.contains("raw (as given"), "{text}");
        let object = json(&run_in(there.path(), &["info", "--json", name]));
        assert_eq!(object["begins_like"], if begins { "qcow2".into() } else { serde_json::Value::Null });
        assert_eq!(object["format"], "raw");
        let copy = format!("{name}.copy");
        let output = run_in(there.path(), &["copy", name, &copy]);
        assert_eq!(code(&output), 0, "{}", stderr(&output));
        let told = stderr(&output).lines().filter(|line| line.contains(&format!("{name}: {hint}"))).count();
        assert_eq!(told, usize::from(begins), "{}", stderr(&output));
        assert!(fs::read(there.path().join(&copy)).expect("read") == bytes);
    }
}

fn blocks(metadata: fs::Metadata) -> u64 {
    std::os::unix::fs::MetadataExt::blocks(&metadata) * 512
}

#[test]
fn refusals() {
    let there = directory();
    dense(&there.path().join("a"), 10, 0);
    for (arguments, expected) in [
        (&["info", "missing"][..], "no such file"),
        (&["info", "."], "directory"),
        (&["info", "/dev/null"], "character device"),
        (&["info", "--format", "qcow2", "a"], "qcow2 is not supported"),
    ] {
        let output = run_in(there.path(), arguments);
        assert_eq!(code(&output), 2, "{arguments:?}");
        assert_eq!(stderr(&output).lines().count(), 1, "{}", stderr(&output));
        assert!(stderr(&output).contains(expected), "{}", stderr(&output));
        let object = json(&run_in(there.path(), &[arguments, &["--json"]].concat()));
        assert_eq!(object["result"], "refused");
        assert_eq!(object["exit_code"], 2);
    }
}

#[test]
fn a_block_device() {
    let there = directory();
    sparse(&there.path().join("a"), 8 << 20);
    let Some(device) = LoopDevice::on(&there.path().join("a")) else { return };
    let object = json(&run_in(there.path(), &["info", "--json", &device.0]));
    assert_eq!(object["kind"], "block_device");
    assert_eq!(object["length"], 8 << 20);
    assert_eq!(object["logical_block_bytes"], 512);
    assert_eq!(object["mounted"], false);
    let text = stdout(&run_in(there.path(), &["info", &device.0]));
    assert!(text.contains("logical block:"), "{text}");
    let object = json(&run_in(there.path(), &["compare", "--json", "a", &device.0]));
    assert_eq!(object["result"], "equal");
}

/// A loop device, which takes root's rights to make.
struct LoopDevice(String);

impl LoopDevice {
    fn on(file: &std::path::Path) -> Option<Self> {
        let output = Command::new("losetup").args(["--find", "--show", "--read-only"]).arg(file).output();
        match output {
            Ok(output) if output.status.success() => Some(Self(stdout(&output).trim().to_owned())),
            _ => {
                eprintln!("SKIPPED: no loop device to be had (needs root)");
                None
            }
        }
    }
}

impl Drop for LoopDevice {
    fn drop(&mut self) {
        Command::new("losetup").args(["--detach", &self.0]).status().ok();
    }
}

//! Models and adapters by path and by hub id, in a made-up cache and from a made-up server.

use std::collections::BTreeMap;
use std::fs;
use std::path::Path;

use peft_io::{HubCache, write_tensors};

const COMMIT: &str = "0123456789abcdef0123456789abcdef01234567";

fn tensor_file(path: &Path) {
    let tensors = BTreeMap::from([("w".to_owned(), (vec![1], vec![1.0]))]);
    write_tensors(path, &tensors, &BTreeMap::new()).unwrap();
}

fn offline(root: &Path) -> HubCache {
    HubCache {
        root: root.to_owned(),
        offline: true,
        endpoint: None,
    }
}

#[test]
fn a_path_wins_and_a_wrong_one_is_not_looked_up() {
    let root = tempfile::tempdir().unwrap();
    let hub = offline(root.path());
    let folder = root.path().join("m");
    fs::create_dir(&folder).unwrap();
    assert_eq!(hub.resolve_model(folder.to_str().unwrap()).unwrap(), folder);
    let gone = root.path().join("gone");
    let error = hub
        .resolve_model(gone.to_str().unwrap())
        .unwrap_err()
        .to_string();
    assert!(
        error.contains("nothing there") && error.contains("owner/name"),
        "{error}"
    );
}

#[test]
fn a_cached_model_is_found_by_branch_and_by_commit() {
    let root = tempfile::tempdir().unwrap();
    let hub = offline(root.path());
    let repo = root.path().join("models--owner--name");
    let snapshot = repo.join("snapshots").join(COMMIT);
    let error = |spec: &str| hub.resolve_model(spec).unwrap_err().to_string();
    let e = error("owner/name");
    assert!(
        e.contains("no owner/name in it") && e.contains("HF_HUB_OFFLINE"),
        "{e}"
    );

    fs::create_dir_all(repo.join("refs/pr")).unwrap();
    fs::write(repo.join("refs/main"), format!("{COMMIT}\n")).unwrap();
    fs::write(repo.join("refs/pr/7"), COMMIT).unwrap();
    assert!(error("owner/name").contains("its revision main is not"));
    fs::create_dir_all(&snapshot).unwrap();
    fs::write(snapshot.join("config.json"), "{}").unwrap();
    assert!(error("owner/name").contains("without config.json and safetensors"));
    tensor_file(&snapshot.join("model.safetensors"));
    for spec in [
        "owner/name",
        "owner/name@main",
        "owner/name@pr/7",
        &format!("owner/name@{COMMIT}"),
    ] {
        assert_eq!(hub.resolve_model(spec).unwrap(), snapshot, "{spec}");
    }
    assert!(error("owner/name@v2").contains("its revision v2 is not"));
    // The adapter of the same name is another thing.
    let e = hub.resolve_adapter("owner/name").unwrap_err().to_string();
    assert!(
        e.contains("cannot find the adapter") && e.contains("adapter_config.json"),
        "{e}"
    );

    // A reference out of the cache is not followed.
    fs::write(repo.join("refs/main"), "../../..").unwrap();
    assert!(error("owner/name").contains("its revision main is not"));
}

#[test]
fn a_sharded_model_counts_only_when_complete() {
    let root = tempfile::tempdir().unwrap();
    let hub = offline(root.path());
    let snapshot = root.path().join("models--gpt2/snapshots").join(COMMIT);
    fs::create_dir_all(root.path().join("models--gpt2/refs")).unwrap();
    fs::write(root.path().join("models--gpt2/refs/main"), COMMIT).unwrap();
    fs::create_dir_all(&snapshot).unwrap();
    fs::write(snapshot.join("config.json"), "{}").unwrap();
    fs::write(
        snapshot.join("model.safetensors.index.json"),
        r#"{"weight_map":{"w":"model-00001-of-00001.safetensors"}}"#,
    )
    .unwrap();
    assert!(hub.resolve_model("gpt2").is_err());
    tensor_file(&snapshot.join("model-00001-of-00001.safetensors"));
    assert_eq!(hub.resolve_model("gpt2").unwrap(), snapshot);
}

#[test]
fn a_cached_adapter_is_found() {
    let root = tempfile::tempdir().unwrap();
    let hub = offline(root.path());
    let repo = root.path().join("models--o--a");
    let snapshot = repo.join("snapshots").join(COMMIT);
    fs::create_dir_all(repo.join("refs")).unwrap();
    fs::write(repo.join("refs/main"), COMMIT).unwrap();
    fs::create_dir_all(&snapshot).unwrap();
    fs::write(snapshot.join("adapter_config.json"), "{}").unwrap();
    assert!(hub.resolve_adapter("o/a").is_err());
    tensor_file(&snapshot.join("adapter_model.safetensors"));
    assert_eq!(hub.resolve_adapter("o/a").unwrap(), snapshot);
}

#[cfg(feature = "hub")]
mod download {
    use std::collections::HashMap;
    use std::io::{BufRead as _, BufReader, Write as _};
    use std::net::TcpListener;
    use std::sync::{Arc, Mutex};

    use super::*;

    /// A server of one repository, `owner/name`, that answers as the hub does; gives its address and the
    /// list of files asked for.
    fn serve(files: HashMap<&'static str, Vec<u8>>) -> (String, Arc<Mutex<Vec<String>>>) {
        let listener = TcpListener::bind("127.0.0.1:0").unwrap();
        let address = format!("http://{}", listener.local_addr().unwrap());
        let asked = Arc::new(Mutex::new(Vec::new()));
        let log = Arc::clone(&asked);
        std::thread::spawn(move || {
            for stream in listener.incoming() {
                let mut stream = stream.unwrap();
                let mut reader = BufReader::new(stream.try_clone().unwrap());
                let mut lines = Vec::new();
                loop {
                    let mut line = String::new();
                    if reader.read_line(&mut line).unwrap_or(0) == 0 || line.trim().is_empty() {
                        break;
                    }
                    lines.push(line.trim().to_owned());
                }
                let Some(target) = lines.first().and_then(|l| l.split(' ').nth(1)) else {
                    continue;
                };
                let range = lines.iter().find_map(|l| {
                    l.to_ascii_lowercase()
                        .strip_prefix("range: bytes=")
                        .map(str::to_owned)
                });
                let (status, head, body) = answer(&files, target, range.as_deref(), &log);
                let head = format!(
                    "HTTP/1.1 {status}\r\nContent-Length: {}\r\nConnection: close\r\n{head}\r\n",
                    body.len()
                );
                let _ = stream
                    .write_all(head.as_bytes())
                    .and_then(|()| stream.write_all(&body));
            }
        });
        (address, asked)
    }

    fn answer(
        files: &HashMap<&'static str, Vec<u8>>,
        target: &str,
        range: Option<&str>,
        log: &Mutex<Vec<String>>,
    ) -> (&'static str, String, Vec<u8>) {
        if target == "/api/models/owner/name/revision/main" {
            let siblings: Vec<_> = files
                .keys()
                .map(|name| serde_json::json!({"rfilename": name}))
                .collect();
            let body = serde_json::json!({"sha": COMMIT, "siblings": siblings});
            return (
                "200 OK",
                "Content-Type: application/json\r\n".into(),
                body.to_string().into(),
            );
        }
        let prefix = format!("/owner/name/resolve/{COMMIT}/");
        let Some((name, bytes)) = target
            .strip_prefix(&prefix)
            .and_then(|n| files.get_key_value(n))
        else {
            return ("404 Not Found", String::new(), Vec::new());
        };
        log.lock().unwrap().push((*name).to_owned());
        let (start, end) = match range.and_then(|r| r.split_once('-')) {
            Some((start, end)) => {
                let end = end.parse().unwrap_or(bytes.len() - 1).min(bytes.len() - 1);
                (start.parse().unwrap_or(0), end + 1)
            }
            None => (0, bytes.len()),
        };
        let head = format!(
            "x-repo-commit: {COMMIT}\r\netag: \"etag-{name}\"\r\nContent-Range: bytes {start}-{}/{}\r\n",
            end - 1,
            bytes.len()
        );
        (
            if range.is_some() {
                "206 Partial Content"
            } else {
                "200 OK"
            },
            head,
            bytes[start..end].to_vec(),
        )
    }

    fn file_bytes() -> Vec<u8> {
        let root = tempfile::tempdir().unwrap();
        let path = root.path().join("x.safetensors");
        tensor_file(&path);
        fs::read(path).unwrap()
    }

    #[test]
    fn what_is_missing_is_downloaded_once_and_nothing_else() {
        let root = tempfile::tempdir().unwrap();
        let (endpoint, asked) = serve(HashMap::from([
            ("config.json", b"{}".to_vec()),
            ("tokenizer.json", b"{\"t\":1}".to_vec()),
            (
                "model.safetensors.index.json",
                br#"{"weight_map":{"w":"model-00001-of-00001.safetensors"}}"#.to_vec(),
            ),
            ("model-00001-of-00001.safetensors", file_bytes()),
            ("pytorch_model.bin", b"pickle".to_vec()),
            ("../../escape.json", b"{}".to_vec()),
        ]));
        let mut hub = HubCache {
            root: root.path().join("hub"),
            offline: false,
            endpoint: Some(endpoint),
        };
        let folder = hub.resolve_model("owner/name").unwrap();
        assert_eq!(
            folder,
            hub.root.join("models--owner--name/snapshots").join(COMMIT)
        );
        let checkpoint = peft_io::Checkpoint::open(&folder).unwrap();
        assert_eq!(checkpoint.f32("w").unwrap().1, [1.0]);
        let mut names: Vec<_> = asked.lock().unwrap().clone();
        names.sort();
        names.dedup();
        let want = [
            "config.json",
            "model-00001-of-00001.safetensors",
            "model.safetensors.index.json",
            "tokenizer.json",
        ];
        assert_eq!(names, want);

        let before = asked.lock().unwrap().len();
        hub.offline = true;
        assert_eq!(hub.resolve_model("owner/name").unwrap(), folder);
        assert_eq!(asked.lock().unwrap().len(), before);
    }

    #[test]
    fn a_repository_without_the_files_says_so() {
        let root = tempfile::tempdir().unwrap();
        let (endpoint, _) = serve(HashMap::from([
            ("config.json", b"{}".to_vec()),
            ("m.gguf", vec![1]),
        ]));
        let hub = HubCache {
            root: root.path().to_owned(),
            offline: false,
            endpoint: Some(endpoint),
        };
        let error = hub.resolve_model("owner/name").unwrap_err().to_string();
        assert!(error.contains("neither model.safetensors nor"), "{error}");
        let error = hub.resolve_adapter("owner/name").unwrap_err().to_string();
        assert!(error.contains("has no adapter_config.json"), "{error}");
        let error = hub.resolve_model("owner/other").unwrap_err().to_string();
        assert!(
            error.contains("404") && error.contains("give the path"),
            "{error}"
        );
    }
}

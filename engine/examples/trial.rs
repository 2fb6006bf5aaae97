//! Trial only.
fn main() {
    let args: Vec<String> = std::env::args().collect();
    let mut o = engine::copy::CopyOptions::new(&args[1], &args[2]);
    o.force = true;
    for a in &args[3..] {
        match a.as_str() {
            "verify" => o.verify = true,
            "nozero" => o.zero_detect = false,
            "threads" => o.io_engine = engine::copy::IoEngine::Threads,
            x if x.starts_with("map=") => o.map = Some(x[4..].into()),
            x if x.starts_with("qd=") => o.queue_depth = Some(x[3..].parse().unwrap()),
            _ => panic!(),
        }
    }
    match engine::copy::start(&o) {
        Err(e) => {
            eprintln!("{e}");
            std::process::exit(2)
        }
        Ok(c) => {
            for n in &c.notices {
                eprintln!("{n}");
            }
            let r = c.job.wait();
            println!("{:?} {:?}", r.outcome, r.notices);
            println!(
                "{:.2} GiB/s {:?}",
                r.progress.total as f64 / r.elapsed.as_secs_f64() / 1e9 * 0.931,
                r.progress
            );
        }
    }
}

//! What the figures were measured on.

use serde::Serialize;
use setun_kernels::Kernels;
use setun_kernels::threads::physical_cores_allowed;

#[derive(Serialize)]
pub struct Machine {
    /// As the CPU calls itself; absent where the system does not tell.
    pub cpu: Option<String>,
    /// Physical cores that this process may use.
    pub physical_cores: usize,
    /// Hardware threads that this process may use.
    pub hardware_threads: usize,
    pub memory_bytes: Option<usize>,
    pub os: &'static str,
    pub arch: &'static str,
    /// Kernel sets this CPU can run, fastest first.
    pub kernels: Vec<&'static str>,
    pub setun: &'static str,
}

impl Machine {
    pub fn here() -> Self {
        Self {
            cpu: field("/proc/cpuinfo", "model name"),
            physical_cores: physical_cores_allowed(),
            hardware_threads: std::thread::available_parallelism().map_or(1, usize::from),
            memory_bytes: memory(),
            os: std::env::consts::OS,
            arch: std::env::consts::ARCH,
            kernels: Kernels::available().map(Kernels::name).collect(),
            setun: env!("CARGO_PKG_VERSION"),
        }
    }
}

impl Machine {
    /// The CPU and its cores, for a headline.
    pub fn title(&self) -> String {
        format!("{}, {} cores", self.cpu.as_deref().unwrap_or("unknown CPU"), self.physical_cores)
    }
}

fn memory() -> Option<usize> {
    memory_field("MemTotal")
}

/// Bytes that a process could get now.
pub fn available_memory() -> Option<usize> {
    memory_field("MemAvailable")
}

fn memory_field(name: &str) -> Option<usize> {
    let value = field("/proc/meminfo", name)?;
    Some(value.strip_suffix("kB")?.trim().parse::<usize>().ok()? * 1024)
}

/// The first value called `name` in a file of `name: value` lines.
fn field(path: &str, name: &str) -> Option<String> {
    let text = std::fs::read_to_string(path).ok()?;
    let value = text.lines().find_map(|line| line.strip_prefix(name)?.trim_start().strip_prefix(':'))?;
    Some(value.trim().to_owned())
}

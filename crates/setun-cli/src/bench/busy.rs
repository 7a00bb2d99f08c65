//! Whether the machine was free while it was measured.

use std::time::Instant;

/// Share of the machine's time that others may take before it is said.
const OTHERS: f64 = 0.05;
/// Share that a hypervisor may take.
const STOLEN: f64 = 0.02;
/// By how much a peak may fall or rise during a run.
const DRIFT: f64 = 0.1;

/// Watches from its making on. Linux tells; elsewhere nothing is known and nothing is said.
pub struct Watch {
    started: Instant,
    before: Option<Ticks>,
    throttled: Option<u64>,
}

/// Hundredths of a second, of all hardware threads together.
#[derive(Clone, Copy, Default)]
struct Ticks {
    total: u64,
    busy: u64,
    stolen: u64,
    own: u64,
}

impl Watch {
    pub fn start() -> Self {
        Self { started: Instant::now(), before: ticks(), throttled: throttled() }
    }

    /// What makes the figures doubtful; `peaks` are those of one setting, earliest first.
    pub fn warnings(&self, peaks: &[[f64; 2]]) -> Vec<String> {
        let mut found = Vec::new();
        if let (Some(before), Some(now)) = (self.before, ticks()) {
            found.extend(shares(before, now));
        }
        if let (Some(before), Some(now)) = (self.throttled, throttled())
            && now > before
        {
            found.push(format!(
                "the control group's limit stopped this process {} times in {:.0} s",
                now - before,
                self.started.elapsed().as_secs_f64()
            ));
        }
        for (at, what) in ["read bandwidth", "arithmetic peak"].into_iter().enumerate() {
            let of = |pick: fn(f64, f64) -> f64, from| peaks.iter().map(|p| p[at]).fold(from, pick);
            let (low, high) = (of(f64::min, f64::INFINITY), of(f64::max, 0.0));
            if low < high * (1.0 - DRIFT) {
                found.push(format!(
                    "the {what} changed by {:.0} % between measurements: the clock, or others, changed",
                    (1.0 - low / high) * 100.0
                ));
            }
        }
        found
    }
}

fn shares(before: Ticks, now: Ticks) -> Vec<String> {
    let total = now.total.saturating_sub(before.total).max(1) as f64;
    let busy = now.busy.saturating_sub(before.busy) as f64;
    let others = (busy - now.own.saturating_sub(before.own) as f64) / total;
    let stolen = now.stolen.saturating_sub(before.stolen) as f64 / total;
    let mut found = Vec::new();
    if others > OTHERS {
        let percent = others * 100.0;
        found.push(format!("other processes took {percent:.0} % of the machine's time: figures are too low"));
    }
    if stolen > STOLEN {
        found.push(format!("the hypervisor took {:.0} % of the machine's time", stolen * 100.0));
    }
    found
}

fn ticks() -> Option<Ticks> {
    let stat = std::fs::read_to_string("/proc/stat").ok()?;
    // user, nice, system, idle, iowait, irq, softirq, steal.
    let fields = stat.lines().next()?.strip_prefix("cpu ")?.split_whitespace();
    let all: Vec<u64> = fields.map(|n| n.parse().ok()).collect::<Option<_>>()?;
    let &[user, nice, system, idle, waiting, irq, soft, stolen, ..] = &all[..] else { return None };
    let busy = user + nice + system + irq + soft;
    let own = std::fs::read_to_string("/proc/self/stat").ok()?;
    // The name in parentheses may hold anything; user and system time are the 12th and 13th field after it.
    let mut own = own.rsplit_once(')')?.1.split_whitespace().skip(11);
    let own = own.next()?.parse::<u64>().ok()? + own.next()?.parse::<u64>().ok()?;
    Some(Ticks { total: busy + idle + waiting + stolen, busy, stolen, own })
}

/// How often the control group's quota stopped its processes.
fn throttled() -> Option<u64> {
    let files = ["/sys/fs/cgroup/cpu.stat", "/sys/fs/cgroup/cpu/cpu.stat"];
    let text = files.iter().find_map(|file| std::fs::read_to_string(file).ok())?;
    text.lines().find_map(|line| line.strip_prefix("nr_throttled ")?.trim().parse().ok())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_what_others_and_the_hypervisor_took_is_warned_of() {
        let before = Ticks { total: 1000, busy: 500, stolen: 10, own: 400 };
        let alone = Ticks { total: 1200, busy: 700, stolen: 10, own: 600 };
        assert!(shares(before, alone).is_empty());
        let beside = Ticks { total: 1200, busy: 700, stolen: 30, own: 520 };
        let found = shares(before, beside);
        assert!(found[0].contains("40 %") && found[1].contains("10 %"), "{found:?}");
    }

    #[test]
    fn a_peak_that_falls_is_told() {
        let watch = Watch { started: Instant::now(), before: None, throttled: None };
        assert!(watch.warnings(&[[50.0, 100.0], [49.0, 99.0]]).is_empty());
        let found = watch.warnings(&[[50.0, 100.0], [40.0, 99.0]]);
        assert!(found.len() == 1 && found[0].contains("read bandwidth changed by 20 %"), "{found:?}");
    }
}

#![no_main]

libfuzzer_sys::fuzz_target!(|data: &[u8]| setun_fuzz::within_bounds(data, setun_fuzz::drive::gguf));

#![no_main]

libfuzzer_sys::fuzz_target!(init: setun_fuzz::allow_caught_panics(), |data: &[u8]| {
    setun_fuzz::within_bounds(data, setun_fuzz::drive::tokenizer_json)
});

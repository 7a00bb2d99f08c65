//! What a user should know before trusting a model.

use setun::config::ModelConfig;
use setun::inspect::{Survey, Values};
use setun::tokenizer::Tokenizer;

use super::Facts;

/// A scale that is so many times the median of its kind, or less by as much, stands out.
const OUTLIER: f32 = 16.0;

pub(super) fn collect(facts: &Facts) -> Vec<String> {
    let mut odd = Vec::new();
    if let Some(found) = &facts.found {
        values(found, &mut odd);
        scales(found, facts.config.as_ref(), &mut odd);
    }
    if let (Some(config), Some(tokenizer)) = (&facts.config, &facts.tokenizer) {
        vocabularies(config, tokenizer, &mut odd);
    }
    if let Some(tokenizer) = &facts.tokenizer {
        talk(facts, tokenizer, &mut odd);
    }
    odd
}

/// `a`, `b`, … of a list.
fn few<'a>(names: impl ExactSizeIterator<Item = &'a str>) -> String {
    let more = if names.len() > 3 { ", …" } else { "" };
    names.take(3).map(|name| format!("`{name}`")).collect::<Vec<_>>().join(", ") + more
}

fn values(found: &Survey, odd: &mut Vec<String>) {
    match &found.not_finite[..] {
        [] => {}
        [one] => odd.push(format!("`{one}` holds NaN or infinite values: the file is damaged")),
        [first, rest @ ..] => {
            let more = if rest.len() == 1 { "tensor" } else { "tensors" };
            odd.push(format!(
                "`{first}` and {} more {more} hold NaN or infinite values: the file is damaged",
                rest.len()
            ));
        }
    }
    match found.unused.len() {
        0 => {}
        1 => odd.push(format!("a tensor is not used: `{}`", found.unused[0])),
        n => odd.push(format!("{n} tensors are not used: {}", few(found.unused.iter().map(String::as_str)))),
    }
    if found.packing.keys().any(|kind| kind.contains("masters")) {
        let what = "holds float masters that are rounded to ternary when loaded: converting makes it several times smaller";
        odd.push(what.into());
    }
    if let Some(zeros) = found.zero_fraction.filter(|zeros| !(0.05..=0.95).contains(zeros)) {
        odd.push(format!("{:.1} % of the ternary weights are 0", zeros * 100.0));
    }
}

/// Scales that no trained model has.
fn scales(found: &Survey, config: Option<&ModelConfig>, odd: &mut Vec<String>) {
    let ternary = found.tensors.iter().filter_map(|t| match &t.values {
        Some(Values::Ternary { scales, bad_scales, .. }) => Some((t, *scales, *bad_scales)),
        _ => None,
    });
    let ternary: Vec<_> = ternary.collect();
    let bad: Vec<&str> =
        ternary.iter().filter(|(_, _, bad)| *bad > 0).map(|(t, ..)| t.name.as_str()).collect();
    if let Some(first) = bad.first() {
        let more = if bad.len() > 1 { format!(" and {} more", bad.len() - 1) } else { String::new() };
        odd.push(format!(
            "`{first}`{more}: scales are negative or not finite, so the file is damaged or misread"
        ));
    }
    let zero: Vec<&str> =
        ternary.iter().filter(|(_, s, _)| s.max == 0.0).map(|(t, ..)| t.name.as_str()).collect();
    if !zero.is_empty() {
        odd.push(format!("all scales are 0 in {}", few(zero.into_iter())));
    }
    // Weights of language models average well below 1; a norm behind them allows for more. The inverse of a usual scale is 20 to 100.
    let norms = config.is_some_and(|c| c.sub_norms || c.inner_norm_eps.is_some());
    let most = if norms { 10.0 } else { 3.0 };
    let mut medians: Vec<f32> = ternary.iter().map(|(_, s, _)| s.median).collect();
    medians.sort_by(f32::total_cmp);
    if let Some(&median) = medians.get(medians.len() / 2).filter(|&&median| median > most) {
        odd.push(format!(
            "scales are around {median:.3}, but weights of language models average far below 1: they may be stored as their \
             inverse (`linear_class` bitlinear divides by weight_scale, autobitlinear multiplies)"
        ));
    }
    for kind in &found.kinds {
        let Some(of_kind) = kind.spread.filter(|s| kind.zero_fraction.is_some() && s.median > 0.0) else {
            continue;
        };
        let far = |median: f32| median > of_kind.median * OUTLIER || median < of_kind.median / OUTLIER;
        let far: Vec<_> =
            ternary.iter().filter(|(t, s, _)| t.kind == kind.kind && s.max > 0.0 && far(s.median)).collect();
        if let (Some((t, s, _)), true) = (far.first(), far.len() * 4 < kind.tensors.max(4)) {
            let more = if far.len() > 1 { format!(" and {} more", far.len() - 1) } else { String::new() };
            let times = s.median / of_kind.median;
            odd.push(format!(
                "the scale of `{}`{more} is {times:.2e} times that of other {}",
                t.name, kind.kind
            ));
        }
    }
}

fn vocabularies(config: &ModelConfig, tokenizer: &Tokenizer, odd: &mut Vec<String>) {
    let (model, vocabulary) = (config.vocab_size, tokenizer.vocab_size());
    if vocabulary > model {
        odd.push(format!(
            "the tokenizer has {vocabulary} tokens, but the model only {model}: some text cannot be run"
        ));
    } else if vocabulary < model {
        odd.push(format!(
            "the tokenizer has {vocabulary} tokens, the model {model}: the last {} have no text",
            model - vocabulary
        ));
    }
    if tokenizer.eos_ids().is_empty() && config.eos.is_empty() {
        odd.push("no end-of-text token is known: texts end only at their length limit".into());
    }
    let ends = |ids: &[u32]| ids.iter().map(u32::to_string).collect::<Vec<_>>().join(", ");
    if !config.eos.is_empty() && !config.eos.iter().any(|id| tokenizer.eos_ids().contains(id)) {
        let (by_config, by_tokenizer) = (ends(&config.eos), ends(tokenizer.eos_ids()));
        odd.push(format!(
            "config and tokenizer disagree on the end of text ({by_config} and {by_tokenizer}): both end it"
        ));
    }
    for &id in config.eos.iter().filter(|&&id| tokenizer.id_to_token(id).is_none()) {
        odd.push(format!("the end token {id} is not in the vocabulary"));
    }
}

/// Template and end of a turn.
fn talk(facts: &Facts, tokenizer: &Tokenizer, odd: &mut Vec<String>) {
    odd.extend(tokenizer.template_notes().iter().cloned());
    let Some(chat) = &facts.chat else {
        if tokenizer.chat_templates().is_empty() {
            odd.push("there is no chat template: fine for a base model, but a tuned one answers badly without its own".into());
        }
        return;
    };
    if tokenizer.chat_templates().is_empty() {
        odd.push(format!("the files have no chat template: conversations use that of {}", chat.origin));
    }
    let absent: Vec<&str> = tokenizer
        .chat_template()
        .map(markers)
        .unwrap_or_default()
        .into_iter()
        .filter(|marker| tokenizer.token_to_id(marker).is_none())
        .collect();
    if !absent.is_empty() {
        let verb = if absent.len() == 1 { "which is no token" } else { "which are no tokens" };
        odd.push(format!(
            "the chat template writes {}, {verb} of the vocabulary: template and tokenizer are of different models",
            few(absent.into_iter())
        ));
    }
    if let setun::chat::TurnEnd::Unknown = chat.turn_end
        && facts.ends.is_empty()
    {
        odd.push("neither the files nor the template say where an answer ends".into());
    }
}

/// `<|…|>` in the source of a template, each once.
fn markers(source: &str) -> Vec<&str> {
    let mut found = Vec::new();
    for (at, _) in source.match_indices("<|") {
        let Some(end) = source[at..].find("|>") else { break };
        let marker = &source[at..at + end + 2];
        let inner = &marker[2..marker.len() - 2];
        let plain = !inner.is_empty() && inner.chars().all(|c| c.is_alphanumeric() || "_-▁".contains(c));
        if plain && !found.contains(&marker) {
            found.push(marker);
        }
    }
    found
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn markers_are_whole_literals_each_once() {
        let source =
            "{{ '<|im_start|>' + role }}<|im_end|>{{ '<|im_start|>' }}{{ '<|' + role + '|>' }}<|a b|>";
        assert_eq!(markers(source), ["<|im_start|>", "<|im_end|>"]);
        assert!(markers("<|open").is_empty());
    }
}

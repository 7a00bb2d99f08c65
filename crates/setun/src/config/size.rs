//! How large a model is: parameters and the linear layers they are in.

use super::ModelConfig;

impl ModelConfig {
    /// Parameters, embeddings counted once when tied; biases and norms included.
    pub fn parameters(&self) -> usize {
        self.parameters_with(self.feed_forward_widths(false))
    }

    /// Parameters that one token's pass uses: as [`ModelConfig::parameters`], with the experts that it goes through.
    pub fn active_parameters(&self) -> usize {
        self.parameters_with(self.feed_forward_widths(true))
    }

    /// `widths`: of the feed-forward layers of all blocks.
    fn parameters_with(&self, widths: usize) -> usize {
        let (h, f) = (self.hidden_size, self.intermediate_size);
        let (q, kv) = (self.heads * self.head_dim, self.kv_heads * self.head_dim);
        let on = |present: bool, n: usize| if present { n } else { 0 };
        let attention = on(self.qkv_bias, q + 2 * kv)
            + on(self.output_bias, h)
            + on(self.sub_norms, q)
            + on(self.qk_norm, 2 * self.head_dim);
        let everywhere = 2 * h + on(self.mlp_bias, 2 * f + h) + on(self.sub_norms, f);
        let small = (0..self.num_layers).map(|n| match self.delta_net(n) {
            Some(net) => everywhere + net.vectors(),
            None => everywhere + attention,
        });
        let feed_forward = 3 * h * widths + self.router_weights();
        let mixers = self.all_mixer_weights() + small.sum::<usize>();
        self.vocab_size * h * (2 - usize::from(self.tied)) + mixers + feed_forward + h
    }

    /// Weights of the linear layers inside the blocks: what a ternary model stores in trits. Routers are left out.
    pub fn block_weights(&self) -> usize {
        self.all_mixer_weights() + 3 * self.hidden_size * self.feed_forward_widths(false)
    }

    fn all_mixer_weights(&self) -> usize {
        let of = |n| self.mixer_weights(n).iter().map(|(_, outputs, inputs)| outputs * inputs).sum::<usize>();
        (0..self.num_layers).map(of).sum()
    }

    /// The linear layers by which block `layer` mixes tokens: name (`self_attn.q_proj`), outputs, inputs.
    pub fn mixer_weights(&self, layer: usize) -> Vec<(&'static str, usize, usize)> {
        let h = self.hidden_size;
        let (q, kv) = (self.heads * self.head_dim, self.kv_heads * self.head_dim);
        match self.delta_net(layer) {
            Some(net) => vec![
                ("linear_attn.in_proj_qkv", net.channels(), h),
                ("linear_attn.in_proj_z", net.values(), h),
                ("linear_attn.in_proj_b", net.value_heads, h),
                ("linear_attn.in_proj_a", net.value_heads, h),
                ("linear_attn.out_proj", h, net.values()),
            ],
            None => vec![
                ("self_attn.q_proj", q * (1 + usize::from(self.attention_gate)), h),
                ("self_attn.k_proj", kv, h),
                ("self_attn.v_proj", kv, h),
                ("self_attn.o_proj", h, q),
            ],
        }
    }
}

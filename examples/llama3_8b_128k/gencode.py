"""LlamaForCausalLM at 131,072 tokens on 8 rank(s), bf16.

Written by train.py --run_mode compile; plan.json holds the plan, report.md explains it.
"""

import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.checkpoint import checkpoint

from chunk_linear_cross_entropy import chunk_linear_cross_entropy
from longctx.kernels.attention import attention
from longctx.kernels.gated import gated
from longctx.kernels.kept import keep, kept
from longctx.kernels.rms_norm import rms_norm
from longctx.runtime.collectives import all_gather, all_to_all, take_slice

# fmt: off
INV_FREQ = torch.tensor(
    [
        1.0, 0.8146172, 0.6636013, 0.540581, 0.44036663, 0.35873023, 0.29222783, 0.23805381, 0.19392276, 0.15797281,
        0.12868738, 0.10483095, 0.0853971, 0.06956595, 0.05666962, 0.04616405, 0.03760603, 0.03063452, 0.024955409,
        0.020329105, 0.01656044, 0.01349042, 0.010989529, 0.008952259, 0.007292665, 0.0059407307, 0.0048394212,
        0.003942276, 0.003211446, 0.002616099, 0.0021311196, 0.0017360467, 0.0014142134, 0.0011520426, 0.00093847385,
        0.000764497, 0.00062277244, 0.00050732115, 0.00041327256, 0.00033665894, 0.0002742482, 0.00022340727,
        0.00018199143, 0.00014825336, 0.00012076974, 9.838111e-05, 8.014295e-05, 6.528582e-05, 5.3182957e-05,
        4.3323755e-05, 3.5292276e-05, 2.8749695e-05, 2.3419998e-05, 1.9078334e-05, 1.554154e-05, 1.2660406e-05,
        1.0313385e-05, 8.401461e-06, 6.8439754e-06, 5.5752203e-06, 4.5416705e-06, 3.699723e-06, 3.013858e-06,
        2.4551407e-06
    ]
)
# fmt: on


def module(**parts):
    """A module that has, under the given names, submodules or parameters of the given shapes."""
    result = nn.Module()
    for name, part in parts.items():
        setattr(result, name, nn.Parameter(torch.empty(part)) if isinstance(part, tuple) else part)
    return result


class LlamaDecoderLayer(nn.Module):
    """model.layers: layers 0 to 31."""

    def __init__(self):
        super().__init__()
        self.input_layernorm = module(weight=(4096,))
        self.self_attn = module(
            q_proj=module(weight=(4096, 4096)),
            k_proj=module(weight=(1024, 4096)),
            v_proj=module(weight=(1024, 4096)),
            o_proj=module(weight=(4096, 4096)),
        )
        self.post_attention_layernorm = module(weight=(4096,))
        self.mlp = module(
            gate_proj=module(weight=(14336, 4096)),
            up_proj=module(weight=(14336, 4096)),
            down_proj=module(weight=(4096, 14336)),
        )

    def forward(self, hidden_states, cos, sin):
        # hidden_states [1, 16384, 4096], cos [1, 131072, 128], sin [1, 131072, 128]
        input_layernorm = rms_norm(hidden_states, self.input_layernorm.weight, eps=1e-05)  # [1, 16384, 4096]

        q_proj = kept("self_attn.q_proj", F.linear, input_layernorm, self.self_attn.q_proj.weight).view(
            1, 16384, -1, 128
        )
        # all-to-all of 134.2 MB: self_attn's transpose is split along dimension 1 of its output
        q_proj = all_to_all(q_proj, split=2, gather=1)  # [1, 131072, 4, 128]
        query_states = q_proj.transpose(1, 2)  # [1, 4, 131072, 128]
        del q_proj
        k_proj = kept("self_attn.k_proj", F.linear, input_layernorm, self.self_attn.k_proj.weight).view(
            1, 16384, -1, 128
        )
        # all-to-all of 33.6 MB: self_attn's transpose is split along dimension 1 of its output
        k_proj = all_to_all(k_proj, split=2, gather=1)  # [1, 131072, 1, 128]
        key_states = k_proj.transpose(1, 2)  # [1, 1, 131072, 128]
        del k_proj
        v_proj = kept("self_attn.v_proj", F.linear, input_layernorm, self.self_attn.v_proj.weight).view(
            1, 16384, -1, 128
        )
        del input_layernorm
        # all-to-all of 33.6 MB: self_attn's transpose is split along dimension 1 of its output
        v_proj = all_to_all(v_proj, split=2, gather=1)  # [1, 131072, 1, 128]
        value_states = v_proj.transpose(1, 2)  # [1, 1, 131072, 128]
        del v_proj
        cos_unsqueeze = cos.unsqueeze(1)  # [1, 1, 131072, 128]
        sin_unsqueeze = sin.unsqueeze(1)  # [1, 1, 131072, 128]
        query_states = (
            query_states * cos_unsqueeze
            + torch.cat((-query_states[..., 64:], query_states[..., :64]), dim=-1) * sin_unsqueeze
        )
        key_states = (
            key_states * cos_unsqueeze
            + torch.cat((-key_states[..., 64:], key_states[..., :64]), dim=-1) * sin_unsqueeze
        )
        attn_output = kept(
            "self_attn.attention", attention, query_states, key_states, value_states, scale=0.08838834764831845
        )
        del query_states, key_states, value_states
        attn_output = attn_output.reshape(1, 131072, -1)  # [1, 131072, 512]
        # all-to-all of 134.2 MB: o_proj's linear is split along dimension 1 of its output
        attn_output = all_to_all(attn_output, split=1, gather=2)  # [1, 16384, 4096]
        attn_output = kept("self_attn.o_proj", F.linear, attn_output, self.self_attn.o_proj.weight)  # [1, 16384, 4096]

        hidden_states = hidden_states + attn_output  # [1, 16384, 4096]
        del attn_output

        post_attention_layernorm = rms_norm(hidden_states, self.post_attention_layernorm.weight, eps=1e-05)

        down_proj = F.linear(
            gated(
                kept("mlp.gate_proj", F.linear, post_attention_layernorm, self.mlp.gate_proj.weight),
                kept("mlp.up_proj", F.linear, post_attention_layernorm, self.mlp.up_proj.weight),
                "silu",
            ),
            self.mlp.down_proj.weight,
        )
        del post_attention_layernorm

        hidden_states = hidden_states + down_proj  # [1, 16384, 4096]
        return hidden_states


class LlamaForCausalLM(nn.Module):
    """The model with its loss, summed over tokens."""

    def __init__(self):
        super().__init__()
        self.model = module(
            embed_tokens=module(weight=(128256, 512)),
            norm=module(weight=(4096,)),
            layers=nn.ModuleList(LlamaDecoderLayer() for _ in range(32)),
        )
        self.lm_head = module(weight=(128256, 4096))
        self.inv_freq = nn.Buffer(INV_FREQ, persistent=False)

    def forward(self, tokens, labels):
        # tokens [1, 131072], labels [1, 131072]
        inputs_embeds = F.embedding(tokens, self.model.embed_tokens.weight.to(torch.bfloat16))  # [1, 131072, 512]
        position_ids = torch.arange(131072, device=tokens.device)  # [131072]
        position_ids = position_ids.unsqueeze(0)  # [1, 131072]
        freqs = position_ids.unsqueeze(2).to(torch.float32) * self.inv_freq  # [1, 131072, 64]
        emb = torch.cat((freqs, freqs), dim=-1)  # [1, 131072, 128]
        del freqs
        cos = emb.cos()  # [1, 131072, 128]
        sin = emb.sin()  # [1, 131072, 128]
        del emb
        cos = cos.to(torch.bfloat16)  # [1, 131072, 128]
        sin = sin.to(torch.bfloat16)  # [1, 131072, 128]
        # all-to-all of 134.2 MB: layers take it split along dimension 1
        hidden_states = all_to_all(inputs_embeds, split=1, gather=2)  # [1, 16384, 4096]
        del inputs_embeds

        # These layers keep their input and the outputs that are named, and compute the rest again in backward.
        hidden_states = checkpoint(
            self.model.layers[0],
            hidden_states,
            cos,
            sin,
            use_reentrant=False,
            preserve_rng_state=False,
            context_fn=keep("self_attn.attention"),
        )

        # These layers keep their input and the outputs that are named, and compute the rest again in backward.
        for layer in self.model.layers[1:29]:
            hidden_states = checkpoint(
                layer,
                hidden_states,
                cos,
                sin,
                use_reentrant=False,
                preserve_rng_state=False,
                context_fn=keep(
                    "self_attn.q_proj",
                    "self_attn.k_proj",
                    "self_attn.v_proj",
                    "self_attn.attention",
                    "self_attn.o_proj",
                    "mlp.gate_proj",
                    "mlp.up_proj",
                ),
            )

        # These layers keep all that their backward pass needs.
        for layer in self.model.layers[29:32]:
            hidden_states = layer(hidden_states, cos, sin)

        hidden_states = rms_norm(hidden_states, self.model.norm.weight, eps=1e-05)  # [1, 16384, 4096]
        # own slice, nothing moves: chunk_linear_cross_entropy is split along dimension 1 of its output
        labels = take_slice(labels, dim=1)  # [1, 16384]
        losses = chunk_linear_cross_entropy(hidden_states, self.lm_head.weight, labels)  # [1, 16384]
        del hidden_states
        # all-gather to 0.5 MB: every rank computes sum whole
        losses = all_gather(losses, dim=1)  # [1, 131072]
        return losses.sum()

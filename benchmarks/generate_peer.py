"""The peer's side of generate.py: transformers' `generate` with a trie behind `prefix_allowed_tokens_fn`."""

from __future__ import annotations

import numpy as np
import torch
import transformers

from core.hf_names import EMBEDDING, HEAD, places
from core.models import LlamaETEGRecModel

ON_GPU = torch.cuda.is_available()


class Peer:
    """A `LlamaForCausalLM` with the weights of a model of ours; codes are tokens, level after level, then BEGIN."""

    def __init__(
        self, model: LlamaETEGRecModel, codes_NL: np.ndarray, sizes: tuple[int, ...], beams: int, k: int
    ) -> None:
        transformers.logging.set_verbosity_error()
        self.versions = {"torch": torch.__version__, "transformers": transformers.__version__}
        self.device = torch.device("cuda" if ON_GPU else "cpu")
        self.first_L = np.array([0, *np.cumsum(sizes)[:-1]])
        self.begin, self.beams, self.k = sum(sizes), beams, k
        self.tokens_NL = codes_NL + self.first_L
        self.item_of = {tuple(tokens): item for item, tokens in enumerate(self.tokens_NL.tolist(), 1)}
        self.children: dict[tuple[int, ...], list[int]] = {}
        for tokens in np.unique(self.tokens_NL, axis=0).tolist():
            for level, token in enumerate(tokens):
                allowed = self.children.setdefault(tuple(tokens[:level]), [])
                if not allowed or allowed[-1] != token:
                    allowed.append(token)
        self.model = self._model(model).to(self.device).eval()

    def _model(self, ours: LlamaETEGRecModel) -> transformers.LlamaForCausalLM:
        """The same weights: code vectors through the projectors are the rows of embedding and head."""
        config = ours.config.llama
        hf = transformers.LlamaConfig(
            vocab_size=self.begin + 1, hidden_size=config.hidden_size, intermediate_size=config.intermediate_size,
            num_hidden_layers=config.num_layers, num_attention_heads=config.num_heads,
            num_key_value_heads=config.num_kv_heads, head_dim=config.head_dim, rms_norm_eps=config.rms_norm_eps,
            max_position_embeddings=config.max_position_embeddings, rope_theta=config.rope_theta,
            tie_word_embeddings=False, bos_token_id=None, eos_token_id=None, pad_token_id=self.begin,
        )  # fmt: skip
        tables = np.concatenate([np.asarray(table[...]) for table in ours.tables])
        rows = tables @ np.asarray(ours.soft_embedding.scid_projector.weight[...])
        head = tables @ np.asarray(ours.codebook_logits.output_projector.weight[...]).T
        tensors = {
            EMBEDDING: np.concatenate([rows, np.asarray(ours.begin_D[...])[None]]),
            HEAD: np.concatenate([head, np.zeros((1, head.shape[1]), np.float32)]),
        }
        for name, place in places(config).items():
            if name in tensors:
                continue
            value = ours.llama
            for part in place.path:
                value = getattr(value, part)
            array = np.asarray(value[...])
            tensors[name] = place.layout.to_hf(array if place.layer is None else array[place.layer])
        model = transformers.LlamaForCausalLM(hf)
        model.load_state_dict({name: torch.tensor(tensor) for name, tensor in tensors.items()})
        return model

    @torch.inference_mode()
    def recommend(self, histories: np.ndarray, lengths: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """(scores [B, k], items [B, k]), best first, by `generate`; left-padded as it wants."""
        batch, history = histories.shape
        levels = self.tokens_NL.shape[1]
        width = 1 + history * levels
        ids = np.full((batch, width), self.begin)
        mask = np.zeros((batch, width), np.int64)
        for row, length in enumerate(lengths.tolist()):
            tokens = [self.begin, *self.tokens_NL[histories[row, :length] - 1].ravel()]
            ids[row, width - len(tokens) :], mask[row, width - len(tokens) :] = tokens, 1
        out = self.model.generate(
            torch.as_tensor(ids, device=self.device), attention_mask=torch.as_tensor(mask, device=self.device),
            num_beams=self.beams, num_return_sequences=self.k, max_new_tokens=levels, do_sample=False,
            length_penalty=0.0, renormalize_logits=True, return_dict_in_generate=True, output_scores=True,
            prefix_allowed_tokens_fn=lambda row, tokens: self.children[tuple(tokens[width:].tolist())],
        )  # fmt: skip
        codes = out.sequences[:, width:].tolist()
        items = np.array([self.item_of[tuple(tokens)] for tokens in codes]).reshape(batch, self.k)
        return out.sequences_scores.float().cpu().numpy().reshape(batch, self.k), items

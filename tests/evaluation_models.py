"""Small models and tokenizers made on the spot, so that these tests need neither data nor network."""

import torch


def byte_tokenizer(positions: int | None = None):
    """One token a byte (256), then <s> (used at the beginning) and </s>."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors
    from transformers import PreTrainedTokenizerFast

    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocab = {piece: i for i, piece in enumerate(alphabet)} | {"<s>": 256, "</s>": 257}
    inner = Tokenizer(models.BPE(vocab=vocab, merges=[]))
    inner.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    inner.decoder = decoders.ByteLevel()
    inner.add_special_tokens(["<s>", "</s>"])
    inner.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 256)])
    return PreTrainedTokenizerFast(tokenizer_object=inner, bos_token="<s>", eos_token="</s>", pad_token="</s>")


def tiny_llama(positions: int = 256, seed: int = 0, hidden: int = 16):
    """A randomly initialised Llama over the byte tokenizer's 258 ids, float32, eval mode."""
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(seed)
    config = LlamaConfig(
        vocab_size=258,
        hidden_size=hidden,
        intermediate_size=32,
        num_hidden_layers=2,
        num_attention_heads=2,
        max_position_embeddings=positions,
        bos_token_id=256,
        eos_token_id=257,
        initializer_range=0.2,
    )
    return LlamaForCausalLM(config).eval()


class ScriptedModel(torch.nn.Module):
    """Answers by a function of the exact prompt: `answer(ids)` -> index of the token that gets the highest logit.

    Like a causal model it gives logits at every position; the script is asked only about whole prompts.
    """

    def __init__(self, answer, vocab_size, positions=100_000):
        super().__init__()
        from types import SimpleNamespace

        self.answer, self.vocab_size = answer, vocab_size
        self.config = SimpleNamespace(max_position_embeddings=positions)
        self.nothing = torch.nn.Parameter(torch.zeros(()))

    def forward(self, input_ids, attention_mask, logits_to_keep):
        from types import SimpleNamespace

        logits = torch.zeros(len(input_ids), len(logits_to_keep), self.vocab_size)
        for row, (ids, mask) in enumerate(zip(input_ids, attention_mask, strict=True)):
            n = int(mask.sum())
            column = (logits_to_keep == n - 1).nonzero().item()
            logits[row, column, self.answer(tuple(ids[:n].tolist()))] = 1.0
        return SimpleNamespace(logits=logits)

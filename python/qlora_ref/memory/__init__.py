"""Will it fit? Three answers that must agree.

`estimate` (closed form), `trace` (meta tensors), `measure` (a real device); `cli` is `qlora-ref estimate`.
"""

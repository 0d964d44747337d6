"""Will it fit? Three answers that must agree: `estimate` (closed form), `trace` (meta tensors), `measure` (a device)."""

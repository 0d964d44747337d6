"""`qlora-ref serve`: a web page and an OpenAI-compatible endpoint for models and adapters on this machine."""

import os

from ..cli import UserError
from .engine import make_engine
from .generate_cli import model_parser
from .serve import LOOPBACK, Server

KEY_VARIABLE = "QLORA_REF_API_KEY"


def main(argv: list[str]) -> int:
    parser = model_parser("qlora-ref serve", (__doc__ or "").replace("`", ""))
    parser.add_argument("--host", default="127.0.0.1", help=f"another address needs an API key in ${KEY_VARIABLE}")
    parser.add_argument("--port", type=int, default=8080, help="0 picks a free one (8080)")
    args = parser.parse_args(argv)
    key = os.environ.get(KEY_VARIABLE) or None
    if args.host not in LOOPBACK and key is None:
        raise UserError(
            f"--host {args.host} is reachable from other machines: set an API key in ${KEY_VARIABLE} first."
        )
    if not 0 <= args.port < 65536:
        raise UserError(f"--port must lie in 0..65535, not {args.port}.")
    if args.max_new_tokens < 1:
        raise UserError("--max-new-tokens (the most that a request may ask for) must be at least 1.")
    engine = make_engine(args.model, args.adapter, args.quant_type, args.template, args.device)
    engine.use(next(iter(engine.served)))
    try:
        server = Server((args.host, args.port), engine, max(args.max_new_tokens, 1), key)
    except OSError as error:
        raise UserError(f"cannot listen on {args.host}:{args.port}: {error.strerror or error}; try --port 0.") from None
    print(
        f"http://{args.host}:{server.server_address[1]}/  serving {', '.join(engine.served)}  (Ctrl-C ends)", flush=True
    )
    try:
        server.serve_forever()
    except KeyboardInterrupt:
        print("\nstopped")
    finally:
        server.server_close()
    return 0

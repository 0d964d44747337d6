"""`qlora-ref eval rate ...`: rate answers yourself on a local web page."""

from .answers import common_items, read_all_answers, read_questions
from .cli_common import add_bad_rows, parser, positive_int, whole_number
from .ledger import Ledger
from .rating_page import RatingSession, fingerprint, make_server, make_tasks, row_key
from .records import BadInput, Notes


def main(argv: list[str]) -> int:
    p = parser("rate", "Blind rating on a web page of this machine. Saved at every answer; the same command resumes.")
    p.add_argument("--questions", required=True, metavar="FILE", help="question_id or message_id, and text")
    p.add_argument("--answers", required=True, action="append", metavar="SYSTEM=FILE", help="once per system")
    p.add_argument("--out", required=True, metavar="FILE", help="human ratings, .jsonl; annotators share it in turn")
    p.add_argument("--annotator", type=int, default=0, metavar="N", help="who is rating: 0, 1, 2 (0)")
    p.add_argument("--limit", type=positive_int, metavar="N", help="only the first N questions")
    p.add_argument("--seed", type=whole_number, default=0, help="draws the sides and the order of the items (0)")
    p.add_argument("--port", type=int, default=0, help="(any free one)")
    add_bad_rows(p)
    args = p.parse_args(argv)
    notes = Notes()
    questions = read_questions(args.questions)
    systems = read_all_answers(args.answers)
    if len(systems) < 2:
        raise BadInput("rating needs the answers of at least two systems: --answers A=FILE --answers B=FILE.")
    items = common_items(questions, systems, args.bad_rows, notes)[: args.limit]
    tasks = make_tasks(questions, systems, items, args.seed)
    for line in notes.lines():
        print(f"- {line}")
    with Ledger(args.out, fingerprint(tasks, args.seed), row_key) as ledger:
        session = RatingSession(tasks, ledger, args.annotator, args.seed)
        server = make_server(session, args.port)
        print(f"open http://127.0.0.1:{server.server_port}/ and stop with Ctrl-C; ratings: {args.out}", flush=True)
        try:
            server.serve_forever(poll_interval=0.2)
        except KeyboardInterrupt:
            pass
        finally:
            server.server_close()
        state = session.next()
        print(f"\n{state['done']} of {state['total']} rated by annotator {args.annotator}")
    return 0

"""The judge prompts of the paper, word for word (lm-sys/FastChat, Apache-2.0, as used by artidoro/qlora, MIT).

The category of a question decides the prompt: coding 2, math 3, everything else 1. The Open Assistant benchmark has
one prompt for all. Relative prompts ask for two scores from 1 to 10, three-class prompts for 1, 2 or 3 (a tie).
"""

SYSTEM_PROMPT = "You are a helpful and precise assistant for checking the quality of the answer."

_TEMPLATE = (
    "[Question]\n{question}\n\n"
    "[The Start of Assistant 1's Answer]\n{answer_1}\n\n[The End of Assistant 1's Answer]\n\n"
    "[The Start of Assistant 2's Answer]\n{answer_2}\n\n[The End of Assistant 2's Answer]\n\n"
    "[System]\n{prompt}\n\n"
)

# How the judge is asked.
TEMPERATURE = 0.2
MAX_TOKENS = 1024

GENERAL, CODING, MATH = 1, 2, 3
_BY_CATEGORY = {"coding": CODING, "math": MATH}
KINDS = ("relative", "threeclass", "oa-threeclass")

_INSTRUCTIONS = {
    ("relative", GENERAL): (
        "We would like to request your feedback on the performance of two AI assistants in response to the "
        "user question displayed above.\n"
        "Please rate the helpfulness, relevance, accuracy, level of details of their responses. Each "
        "assistant receives an overall score on a scale of 1 to 10, where a higher score indicates better "
        "overall performance.\n"
        "Please first output a single line containing only two values indicating the scores for Assistant 1 "
        "and 2, respectively. The two scores are separated by a space. In the subsequent line, please provide"
        " a comprehensive explanation of your evaluation, avoiding any potential bias and ensuring that the "
        "order in which the responses were presented does not affect your judgment."
    ),
    ("relative", CODING): (
        "Your task is to evaluate the coding abilities of the above two assistants. They have been asked to "
        "implement a program to solve a given problem. Please review their code submissions, paying close "
        "attention to their problem-solving approach, code structure, readability, and the inclusion of "
        "helpful comments.\n"
        "\n"
        "Please ensure that the assistants' submissions:\n"
        "\n"
        "1. Correctly implement the given problem statement.\n"
        "2. Contain accurate and efficient code.\n"
        "3. Include clear and concise comments that explain the code's logic and functionality.\n"
        "4. Adhere to proper coding standards and best practices.\n"
        "\n"
        "Once you have carefully reviewed both submissions, provide detailed feedback on their strengths and "
        "weaknesses, along with any suggestions for improvement. You should first output a single line "
        "containing two scores on the scale of 1-10 (1: no code/no sense; 10: perfect) for Assistant 1 and 2,"
        " respectively. Then give extra comments starting from the next line."
    ),
    ("relative", MATH): (
        "We would like to request your feedback on the mathematical proficiency of two AI assistants "
        "regarding the given user question displayed above.\n"
        "First, please solve the problem independently, without referring to the answers provided by "
        "Assistant 1 and Assistant 2.\n"
        "Afterward, please examine the problem-solving process of Assistant 1 and Assistant 2 step-by-step to"
        " ensure their correctness, identifying any incorrect steps if present. Your evaluation should take "
        "into account not only the answer but also the problem-solving steps.\n"
        "Finally, please output a Python tuple containing two numerical scores for Assistant 1 and Assistant "
        "2, ranging from 1 to 10, respectively. If applicable, explain the reasons for any variations in "
        "their scores and determine which assistant performed better."
    ),
    ("threeclass", GENERAL): (
        "We would like to request your feedback on the performance of two AI assistants in response to the "
        "user question displayed above.\n"
        "Please rate the helpfulness, relevance, accuracy, level of details of their responses. First, "
        "provide your evaluation of the assistant's helpfulness, relevance, accuracy, and level of detail. "
        "Please provide a comprehensive explanation of your evaluation, avoiding any potential bias and "
        "ensuring that the order in which the responses were presented does not affect your judgment.\n"
        "Once you have carefully reviewed both submissions, in a new line, choose between the answers of "
        "Assistant 1 and Assistant 2 by outputting the number 1 or 2 respectively, or choose 3 if the two "
        "assistants are equivalent. Do not output anything else other than the number in this last line."
    ),
    ("threeclass", CODING): (
        "Your task is to evaluate the coding abilities of the above two assistants. They have been asked to "
        "implement a program to solve a given problem. Please review their code submissions, paying close "
        "attention to their problem-solving approach, code structure, readability, and the inclusion of "
        "helpful comments.\n"
        "\n"
        "Please ensure that the assistants' submissions:\n"
        "\n"
        "1. Correctly implement the given problem statement.\n"
        "2. Contain accurate and efficient code.\n"
        "3. Include clear and concise comments that explain the code's logic and functionality.\n"
        "4. Adhere to proper coding standards and best practices.\n"
        "\n"
        "Once you have carefully reviewed both submissions, in a new line, choose between the answers of "
        "Assistant 1 and Assistant 2 by outputting the number 1 or 2 respectively, or choose 3 if the two "
        "assistants are equivalent. Do not output anything else other than the number in this last line."
    ),
    ("threeclass", MATH): (
        "We would like to request your feedback on the mathematical proficiency of two AI assistants "
        "regarding the given user question displayed above.\n"
        "First, please solve the problem independently, without referring to the answers provided by "
        "Assistant 1 and Assistant 2.\n"
        "Afterward, please examine the problem-solving process of Assistant 1 and Assistant 2 step-by-step to"
        " ensure their correctness, identifying any incorrect steps if present. Your evaluation should take "
        "into account not only the answer but also the problem-solving steps.\n"
        "Finally, in a new line choose between the answers of Assistant 1 and Assistant 2 by outputting the "
        "number 1 or 2 respectively, or choose 3 if the two assistants are equivalent. Do not output anything"
        " else other than the number in this last line."
    ),
    ("oa-threeclass", GENERAL): (
        "We would like to request your feedback on the performance of two AI assistants in response to the "
        "user question displayed above.\n"
        "Please rate the helpfulness, relevance, accuracy, and level of detail of the responses of their "
        "responses. If the question involves coding or mathematical reasoning, please solve the problem first"
        " before rating the correctness, problem-solving skills, and helpfulness of the answers. Please "
        "provide an explanation of your evaluation avoiding any potential bias, and ensure that the order of "
        "the responses does not affect your judgment.\n"
        "Once you carefully reviewed both submissions, in a new line, choose the best answer between the "
        "answer of Assistant 1 and Assistant 2 by outputting the number 1 or 2 respectively, or choose 3 if "
        "the two assistants are equivalent. Do not output anything else other than the number in the last "
        "line."
    ),
}


def prompt_id(kind: str, category: str | None) -> int:
    """Which prompt a question of `category` gets."""
    return GENERAL if kind == "oa-threeclass" else _BY_CATEGORY.get(category or "", GENERAL)


def judge_messages(
    kind: str, category: str | None, question: str, answer_1: str, answer_2: str
) -> list[dict[str, str]]:
    """The chat messages that ask for one verdict; `answer_1` is the answer shown first."""
    if kind not in KINDS:
        raise ValueError(f"kind must be one of {', '.join(KINDS)}, not {kind!r}.")
    text = _TEMPLATE.format(
        question=question,
        answer_1=answer_1,
        answer_2=answer_2,
        prompt=_INSTRUCTIONS[kind, prompt_id(kind, category)],
    )
    return [{"role": "system", "content": SYSTEM_PROMPT}, {"role": "user", "content": text}]

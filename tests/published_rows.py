"""Rows as the data sets publish them: their fields, nesting and types, with texts of our own."""

import math


def user(text):
    return {"role": "user", "content": text}


def assistant(text):
    return {"role": "assistant", "content": text}


def completion(model, response, fine, overall):
    rating = {"Rating": "4", "Rationale": "Clear."}
    return {
        "model": model,
        "principle": "helpfulness",
        "custom_system_prompt": "Be helpful.",
        "response": response,
        "annotations": {name: rating for name in ("helpfulness", "honesty", "instruction_following", "truthfulness")},
        "critique": "Fine.",
        "overall_score": overall,
        "fine-grained_score": fine,
    }


Q, ASKED = "Why is the sky blue?", [("user", "Why is the sky blue?")]
GOOD, BAD = [("assistant", "Air scatters blue.")], [("assistant", "Paint.")]
SHP = {
    "post_id": "hcyzcc",
    "domain": "askphysics_train",
    "upvote_ratio": 0.98,
    "history": Q,
    "c_root_id_A": "a1",
    "c_root_id_B": "b1",
    "created_at_utc_A": 1592000000,
    "created_at_utc_B": 1592000100,
    "score_A": 3,
    "score_B": 12,
    "human_ref_A": "Paint.",
    "human_ref_B": "Air scatters blue.",
    "labels": 0,
    "seconds_difference": 100.0,
    "score_ratio": 4.0,
}
SAFE = {
    "prompt": Q,
    "response_0": "Paint.",
    "response_1": "Air scatters blue.",
    "prompt_source": "Alpaca3-70B",
    "response_0_source": "WizardLM-30B-Uncensored",
    "response_1_source": "Alpaca3-70B",
    "is_response_0_safe": True,
    "is_response_1_safe": True,
    "response_0_harm_category": {"Privacy Violation": False, "Violence": False},
    "response_1_harm_category": {"Privacy Violation": False, "Violence": False},
    "response_0_severity_level": 0,
    "response_1_severity_level": 0,
    "better_response_id": 1,
    "safer_response_id": 0,
    "response_0_sha256": "00",
    "response_1_sha256": "11",
}
TLDR = {
    "info": {
        "id": "t3_abc",
        "post": "I asked a physicist.",
        "title": "The sky",
        "subreddit": "askscience",
        "site": None,
        "article": None,
    },
    "summaries": [
        {"text": " Paint.", "policy": "sup1", "note": None},
        {"text": " Air scatters blue.", "policy": "ref", "note": "good"},
    ],
    "choice": 1,
    "worker": "w1",
    "batch": "batch3",
    "split": "train",
    "extra": {"confidence": 7},
}
TLDR_PROMPT = "SUBREDDIT: r/askscience\n\nTITLE: The sky\n\nPOST: I asked a physicist.\n\nTL;DR:"
ORPO_TURNS = [user("Hi."), assistant("Hello."), user(Q)]


def graded(instruction, response):
    """A response inside the prompt by which Prometheus grades it."""
    asked = "###Task Description:\nWrite a detailed feedback.\n\n###The instruction to evaluate:\n" + instruction
    rubric = "###Score Rubrics:\n[Is it true?]\nScore 1: No.\n\n###Feedback: "
    return f"{asked}\n\n###Response to evaluate:\n{response}\n\n{rubric}"


# Data set -> (format, row, prompt, chosen, rejected, margin or None).
PAIRS = {
    "Anthropic/hh-rlhf": (
        "common",
        {
            "chosen": f"\n\nHuman: {Q}\n\nAssistant: Air scatters blue.",
            "rejected": f"\n\nHuman: {Q}\n\nAssistant: Paint.",
        },
        f"\n\nHuman: {Q}\n\nAssistant:",
        " Air scatters blue.",
        " Paint.",
        None,
    ),
    "HuggingFaceH4/ultrafeedback_binarized": (
        "common",
        {
            "prompt": Q,
            "prompt_id": "f0e3",
            "chosen": [user(Q), assistant("Air scatters blue.")],
            "rejected": [user(Q), assistant("Paint.")],
            "messages": [user(Q), assistant("Air scatters blue.")],
            "score_chosen": 8.5,
            "score_rejected": 6.0,
        },
        ASKED,
        GOOD,
        BAD,
        2.5,
    ),
    "trl-lib/ultrafeedback_binarized": (
        "common",
        {
            "chosen": [user(Q), assistant("Air scatters blue.")],
            "rejected": [user(Q), assistant("Paint.")],
            "score_chosen": 7.0,
            "score_rejected": 6.0,
        },
        ASKED,
        GOOD,
        BAD,
        1.0,
    ),
    "argilla/ultrafeedback-binarized-preferences-cleaned": (
        "common",
        {
            "source": "evol_instruct",
            "prompt": Q,
            "chosen": [user(Q), assistant("Air scatters blue.")],
            "chosen-rating": 5.0,
            "chosen-model": "gpt-4",
            "rejected": [user(Q), assistant("Paint.")],
            "rejected-rating": 3.75,
            "rejected-model": "alpaca-7b",
        },
        ASKED,
        GOOD,
        BAD,
        1.25,
    ),
    "openbmb/UltraFeedback": (
        "ultrafeedback",
        {
            "source": "evol_instruct",
            "instruction": Q,
            "models": ["alpaca-7b", "gpt-4", "llama-2-7b-chat", "falcon-40b"],
            "completions": [
                completion("alpaca-7b", "Paint.", 2.0, 10.0),  # where 1 was meant
                completion("gpt-4", "Air scatters blue.", 4.75, 8.5),
                completion("llama-2-7b-chat", "Water.", 3.0, 6.0),
                completion("falcon-40b", "Magic.", None, None),
            ],
            "correct_answers": ["None"],
            "incorrect_answers": ["None"],
        },
        ASKED,
        GOOD,
        BAD,
        2.75,
    ),
    "mlabonne/orpo-dpo-mix-40k": (
        "common",
        {
            "source": "Airoboros",
            "chosen": [*ORPO_TURNS, assistant("Air scatters blue.")],
            "rejected": [*ORPO_TURNS, assistant("Paint.")],
            "prompt": Q,
            "question": Q,
        },
        [("user", "Hi."), ("assistant", "Hello."), *ASKED],
        GOOD,
        BAD,
        None,
    ),
    "stanfordnlp/SHP": ("shp", SHP, ASKED, GOOD, BAD, math.log(4)),
    "lvwerra/stack-exchange-paired": (
        "stack_exchange_paired",
        {
            "qid": 7,
            "question": Q,
            "date": "2021/01/01",
            "metadata": ["https://physics.stackexchange.com/q/7"],
            "response_j": "Air scatters blue.",
            "response_k": "Paint.",
        },
        ASKED,
        GOOD,
        BAD,
        None,
    ),
    "HuggingFaceH4/stack-exchange-preferences": (
        "stack_exchange",
        {
            "qid": 7,
            "question": Q,
            "answers": [
                {"answer_id": 1, "author": "a", "pm_score": 1, "selected": False, "text": "Water."},
                {"answer_id": 2, "author": "b", "pm_score": 0, "selected": False, "text": "Paint."},
                {"answer_id": 3, "author": "c", "pm_score": 5, "selected": True, "text": "Air scatters blue."},
            ],
            "date": "2021/01/01",
            "metadata": ["https://physics.stackexchange.com/q/7"],
        },
        ASKED,
        GOOD,
        BAD,
        5.0,
    ),
    "berkeley-nest/Nectar": (
        "nectar",
        {
            "prompt": f"\n\nHuman: {Q}\n\nAssistant: ",
            "answers": [
                {"answer": "Water.", "model": "llama-2-7b-chat", "rank": 2.0},
                {"answer": "Air scatters blue.", "model": "gpt-4", "rank": 1.0},
                {"answer": "Paint.", "model": "gpt-3.5-turbo", "rank": 3.0},
            ],
            "turns": 1,
            "num_responses": 3,
            "source": ["lmsys-chat-1m"],
            "good_natured": True,
        },
        f"\n\nHuman: {Q}\n\nAssistant:",
        " Air scatters blue.",
        " Paint.",
        2.0,
    ),
    "PKU-Alignment/PKU-SafeRLHF": ("pku_saferlhf", SAFE, ASKED, GOOD, BAD, None),
    "nvidia/HelpSteer2, preference": (
        "helpsteer2_preference",
        {
            "split": "train",
            "prompt": Q,
            "response_1": "Paint.",
            "response_2": "Air scatters blue.",
            "preference_strength": 2,
            "preference_statement": "Response 2 is better than Response 1.",
            "preference_elaboration": "It is true.",
            "three_most_similar_preferences": [{"statement": "", "elaboration": "", "strength": 2}],
            "all_preferences_unprocessed": [{"strength": 2, "timespent": 60}],
        },
        ASKED,
        GOOD,
        BAD,
        2.0,
    ),
    "nvidia/HelpSteer3": (
        "helpsteer3",
        {
            "domain": "stem",
            "language": "english",
            "context": ORPO_TURNS,
            "response1": "Air scatters blue.",
            "response2": "Paint.",
            "overall_preference": -3,
            "individual_preference": [{"score": -3, "reasoning": "True.", "feedback_1": "", "feedback_2": ""}],
        },
        [("user", "Hi."), ("assistant", "Hello."), *ASKED],
        GOOD,
        BAD,
        3.0,
    ),
    "openai/summarize_from_feedback": (
        "summarize_from_feedback",
        TLDR,
        TLDR_PROMPT,
        " Air scatters blue.",
        " Paint.",
        None,
    ),
    "openai/summarize_from_feedback, CNN/DM": (
        "summarize_from_feedback",
        {**TLDR, "info": {**dict.fromkeys(TLDR["info"]), "id": "c", "article": "The sky is blue."}, "choice": 0},
        "Article: The sky is blue.\n\nTL;DR:",
        " Paint.",
        " Air scatters blue.",
        None,
    ),
    "Intel/orca_dpo_pairs": (
        "orca",
        {"system": "Be brief.", "question": Q, "chosen": "Air scatters blue.", "rejected": "Paint."},
        [("system", "Be brief."), *ASKED],
        GOOD,
        BAD,
        None,
    ),
    "argilla/distilabel-intel-orca-dpo-pairs": (
        "orca_input",
        {
            "system": "",
            "input": Q,
            "chosen": "Air scatters blue.",
            "rejected": "Paint.",
            "generations": ["Air scatters blue.", "Paint."],
            "rating": [9.0, 1.0],
            "status": "unchanged",
        },
        ASKED,
        GOOD,
        BAD,
        None,
    ),
    "OpenAI's preference fine-tuning": (
        "openai_preference",
        {
            "input": {"messages": [{"role": "system", "content": "Be brief."}, user(Q)], "parallel_tool_calls": True},
            "preferred_output": [assistant("Air scatters blue.")],
            "non_preferred_output": [assistant("Paint.")],
        },
        [("system", "Be brief."), *ASKED],
        GOOD,
        BAD,
        None,
    ),
    "torchtune": (
        "torchtune",
        {
            "chosen_conversations": [user(Q), assistant("Air scatters blue.")],
            "rejected_conversations": [user(Q), assistant("Paint.")],
        },
        ASKED,
        GOOD,
        BAD,
        None,
    ),
    "axolotl, chat_template.default": (
        "messages_preference",
        {"messages": ORPO_TURNS, "chosen": assistant("Air scatters blue."), "rejected": assistant("Paint.")},
        [("user", "Hi."), ("assistant", "Hello."), *ASKED],
        GOOD,
        BAD,
        None,
    ),
    "axolotl, chatml.ultra": (
        "common",
        {
            "system": "Be brief.",
            "prompt": Q,
            "chosen": [user(Q), assistant("Air scatters blue.")],
            "rejected": [user(Q), assistant("Paint.")],
        },
        [("system", "Be brief."), *ASKED],
        GOOD,
        BAD,
        None,
    ),
    "axolotl, chatml.argilla": (
        "argilla",
        {
            "system": "Be brief.",
            "instruction": Q,
            "chosen_response": "Air scatters blue.",
            "rejected_response": "Paint.",
        },
        [("system", "Be brief."), *ASKED],
        GOOD,
        BAD,
        None,
    ),
    "LLaMA-Factory": (
        "alpaca_preference",
        {
            "system": "Be brief.",
            "instruction": "Why is it blue?",
            "input": "The sky.",
            "history": [["Hi.", "Hello."]],
            "chosen": "Air scatters blue.",
            "rejected": "Paint.",
        },
        [("system", "Be brief."), ("user", "Hi."), ("assistant", "Hello."), ("user", "Why is it blue?\n\nThe sky.")],
        GOOD,
        BAD,
        None,
    ),
    "LLaMA-Factory, a list as output": (
        "alpaca",
        {"instruction": Q, "input": "", "output": ["Air scatters blue.", "Paint."]},
        ASKED,
        GOOD,
        BAD,
        None,
    ),
    "mlx-lm-lora": (
        "common",
        {
            "prompt": Q,
            "chosen": {"messages": [assistant("Air scatters blue.")]},
            "rejected": {"messages": [assistant("Paint.")]},
        },
        ASKED,
        GOOD,
        BAD,
        None,
    ),
    "princeton-nlp/LLMBar": (
        "llmbar",
        {"input": Q, "output_1": "Paint.", "output_2": "Air scatters blue.", "label": 2},
        ASKED,
        GOOD,
        BAD,
        None,
    ),
    "ScalerLab/JudgeBench": (
        "judgebench",
        {
            "pair_id": "e302b0a0",
            "original_id": 1420,
            "source": "mmlu-pro-physics",
            "question": Q,
            "response_model": "gpt-4o-2024-05-13",
            "response_A": "Air scatters blue.",
            "response_B": "Paint.",
            "label": "A>B",
        },
        ASKED,
        GOOD,
        BAD,
        None,
    ),
    "GAIR-NLP/auto-j": (
        "autoj",
        {
            "scenario": "explaining_general",
            "label": 1,
            "prompt": Q,
            "response 1": "Paint.",
            "response 2": "Air scatters blue.",
        },
        ASKED,
        GOOD,
        BAD,
        None,
    ),
    "HuggingFaceH4/hhh_alignment": (
        "hhh_alignment",
        {"input": Q, "targets": {"choices": ["Air scatters blue.", "Paint."], "labels": [1, 0]}},
        ASKED,
        GOOD,
        BAD,
        None,
    ),
    "prometheus-eval's HHH alignment": (
        "prometheus_hhh",
        {
            "source": "honest",
            "chosen_instruction": graded(Q, "Air scatters blue."),
            "rejected_instruction": graded(Q, "Paint."),
        },
        ASKED,
        GOOD,
        BAD,
        None,
    ),
    "lmsys/mt_bench_human_judgments": (
        "mt_bench_human",
        {
            "question_id": 81,
            "model_a": "alpaca-13b",
            "model_b": "gpt-3.5-turbo",
            "winner": "model_b",
            "judge": "author_2",
            "conversation_a": [user(Q), assistant("Paint."), user("Why?"), assistant("It is.")],
            "conversation_b": [user(Q), assistant("Air scatters blue."), user("Why?"), assistant("It does.")],
            "turn": 1,
        },
        ASKED,
        GOOD,
        BAD,
        None,
    ),
    "allenai/reward-bench": (
        "rewardbench",
        {
            "prompt": Q,
            "chosen": "Air scatters blue.",
            "chosen_model": "gpt-4",
            "rejected": "Paint.",
            "rejected_model": "alpaca-7b",
            "subset": "alpacaeval-easy",
            "id": 30,
        },
        ASKED,
        GOOD,
        BAD,
        None,
    ),
    "ShareGPT turns with chosen and rejected": (
        "sharegpt",
        {
            "conversations": [{"from": "system", "value": "Be brief."}, {"from": "human", "value": Q}],
            "chosen": {"from": "gpt", "value": "Air scatters blue."},
            "rejected": {"from": "gpt", "value": "Paint."},
        },
        [("system", "Be brief."), *ASKED],
        GOOD,
        BAD,
        None,
    ),
}


PANDALM = {
    "idx": 0,
    "motivation_app": "Wikipedia",
    "cmp_key": "bloom-7b_llama-7b",
    "instruction": Q,
    "input": math.nan,  # as pandas wrote it
    "response1": "Paint.",
    "response2": "Air scatters blue.",
    "annotator1": 2,
    "annotator2": 2,
    "annotator3": 0,
}
ALPACA_EVAL = {
    "instruction": Q,
    "output_1": "Paint.",
    "generator_1": "gpt4_1106_preview",
    "dataset": "helpful_base",
    "output_2": "Air scatters blue.",
    "generator_2": "mine",
    "annotator": "weighted_alpaca_eval_gpt4_turbo",
    "preference": 1.75,
    "raw_completion": {"logprobs": None},
    "price_per_example": 0.01,
    "time_per_example": 0.4,
}


def helpsteer(prompt, response, helpfulness):
    return {
        "prompt": prompt,
        "response": response,
        "helpfulness": helpfulness,
        "correctness": 4,
        "coherence": 4,
        "complexity": 2,
        "verbosity": 1,
    }


def sample(prompt, response, reward):
    return {"prompt": prompt, "response": response, "model": "mine", "step": 10, "seed": 0, "reward": reward}


KTO = {"prompt": ORPO_TURNS, "completion": [assistant("Air scatters blue.")], "label": True}


ALPACA = {
    "instruction": Q,
    "input": "",
    "output": "Air scatters blue.",
    "text": f"### Instruction:\n{Q}\n\n### Response:\nAir scatters blue.",
}
SHAREGPT = {
    "id": "QWJhYvA_0",
    "conversations": [
        {"from": "human", "value": Q},
        {"from": "gpt", "value": "Air scatters blue."},
        {"from": "human", "value": "Thanks!"},
    ],
}


WEATHER = {
    "type": "function",
    "function": {"name": "weather", "parameters": {"type": "object", "properties": {"city": {"type": "string"}}}},
}
CALL = {
    "role": "assistant",
    "content": None,
    "tool_calls": [
        {"id": "1", "type": "function", "function": {"name": "weather", "arguments": '{"city": "Rome", "unit": null}'}}
    ],
    "name": None,
}

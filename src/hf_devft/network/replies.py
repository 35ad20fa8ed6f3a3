"""A client's answers to Flower's messages, whatever process they arrive in."""

import logging

from flwr.app import ConfigRecord, RecordDict

from hf_devft.network.messages import (
    JOIN,
    KEYS,
    NO_STAGE,
    REVEAL,
    SHARES,
    STAGE,
    TOLD,
    TRAIN,
    TRAINED,
    StageMessage,
    Turn,
    by_client,
    refusal,
    to_clients,
    typed,
)
from hf_devft.network.participant import Participant, UnknownStageError
from hf_devft.network.secure_sum import SecureSumError


logger = logging.getLogger(__name__)


def reply_to(participant: Participant, content: RecordDict) -> RecordDict:
    """Answer a message: join, take part in a secure sum, or enter the stage that it has, where it has one, and take a
    turn.

    An error is an answer, too: the participant goes on, and the server leaves it out of the round.
    """
    try:
        if JOIN in content:
            settings, challenge = typed(content[JOIN], "settings", str), typed(content[JOIN], "challenge", bytes)
            return RecordDict({JOIN: ConfigRecord(vars(participant.join(settings, challenge)))})
        if KEYS in content:
            return RecordDict(
                {KEYS: ConfigRecord({"public": participant.begin_sum(typed(content[KEYS], "client", int))})}
            )
        if SHARES in content:
            told = participant.sum.share(by_client(content[TOLD]), typed(content[SHARES], "threshold", int))
            return RecordDict({SHARES: to_clients(told)})
        if REVEAL in content:
            arrived, missing = (typed(content[REVEAL], name, list) for name in ("arrived", "missing"))
            return RecordDict({REVEAL: to_clients(participant.sum.reveal(arrived, missing))})
        turn = Turn.from_record(content[TRAIN])
        if STAGE in content:
            participant.enter_stage(StageMessage.from_record(content[STAGE]))
        told = by_client(content[TOLD]) if TOLD in content else None
        return RecordDict({TRAINED: participant.take_turn(turn, told)})
    except UnknownStageError:
        answer = refusal(NO_STAGE)
        answer[JOIN] = ConfigRecord(vars(participant.itself()))  # it was started anew, perhaps with other rows
        return answer
    except Exception as error:
        logger.exception("a turn failed")
        if type(error) in (ValueError, SecureSumError):  # ours, and none of rows
            return refusal(str(error).replace(str(participant.folder), "its folder"))
        return failure(error)


def failure(error: Exception) -> RecordDict:
    """What a client answers that has failed: the error's type alone, as its text may quote what stays here."""
    return refusal(f"{type(error).__name__}; its own log says more")

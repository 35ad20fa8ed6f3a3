"""A client's answers to Flower's messages, whatever process they arrive in."""

import logging

from flwr.app import ConfigRecord, RecordDict

from hf_devft.network.messages import (
    JOIN,
    NO_STAGE,
    STAGE,
    TRAIN,
    TRAINED,
    StageMessage,
    Turn,
    refusal,
)
from hf_devft.network.participant import Participant, UnknownStageError


logger = logging.getLogger(__name__)


def reply_to(participant: Participant, content: RecordDict) -> RecordDict:
    """Answer a message: join, or enter the stage that it has, where it has one, and take a turn.

    An error is an answer, too: the participant goes on, and the server leaves it out of the round.
    """
    try:
        if JOIN in content:
            return RecordDict({JOIN: ConfigRecord(vars(participant.join()))})
        turn = Turn.from_record(content[TRAIN])
        if STAGE in content:
            participant.enter_stage(StageMessage.from_record(content[STAGE]))
        return RecordDict({TRAINED: participant.take_turn(turn)})
    except UnknownStageError:
        return refusal(NO_STAGE)
    except Exception as error:
        logger.exception("a turn failed")
        return refusal(f"{type(error).__name__}: {error}")

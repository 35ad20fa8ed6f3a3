"""A participant as Flower's own SuperNode starts it: a process for each message, which loads the base each time.

The node's config says what the flags of `hf_devft.network.node` say there:
`flower-supernode --node-config 'name="hospital-a" train-file="/data/rows.jsonl"'`.
"""

import logging
from typing import Any

from flwr.app import Context, Message
from flwr.clientapp import ClientApp

from hf_devft.network.messages import JOIN
from hf_devft.network.node import DataArguments
from hf_devft.network.replies import failure, reply_to


app = ClientApp()
logger = logging.getLogger(__name__)


@app.query(JOIN)
@app.train()
def answer(message: Message, context: Context) -> Message:
    """Answer a message of the server's."""
    given: dict[str, Any] = {key.replace("-", "_"): value for key, value in context.node_config.items()}
    lists = {key: [given.pop(key)] for key in ("train_file", "dataset_name") if key in given}
    try:
        participant = DataArguments(**lists, **given).participant()
    except Exception as error:
        logger.exception("the node's config or rows cannot be read")
        return Message(failure(error), reply_to=message)
    return Message(reply_to(participant, message.content), reply_to=message)

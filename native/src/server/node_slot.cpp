#include "server/node_slot.hpp"

#include <string>
#include <utility>

#include "wire/reply.hpp"
#include "wire/request.hpp"

namespace fc::server {

// The names of namespaces are not looked at: which of them there are is for the node to say.
void NodeSlot::answer_without_node(const RequestBytes& request, const ReplyDone& done) const {
  if (!misses_until_attached_) return done(recovering(), {});
  wire::Limits limits;
  limits.keys = max_batch_keys_;
  wire::GetRequest decoded;
  if (std::string error = wire::decode(request.bytes, limits, decoded); !error.empty()) {
    return done({CallStatus::InvalidArgument, std::move(error)}, {});
  }
  wire::GetReplyEncoder reply(decoded.request_id);
  for (const wire::KeyColumn& column : decoded.columns) {
    const std::vector<CellStatus> statuses(column.keys.size(), CellStatus::Miss);
    const std::vector<std::uint32_t> lengths(column.keys.size(), 0);
    reply.add_column(statuses, lengths, Buffer());
  }
  done({}, std::move(reply).finish());
}

CallStatus NodeSlot::recovering() {
  return {CallStatus::Unavailable, "the daemon is recovering: try again"};
}

}  // namespace fc::server

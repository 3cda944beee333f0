#include "client_bindings.hpp"

#include <pybind11/functional.h>
#include <pybind11/numpy.h>
#include <pybind11/stl.h>

#include <cmath>
#include <cstring>
#include <limits>
#include <memory>
#include <mutex>
#include <optional>
#include <span>
#include <utility>
#include <variant>
#include <vector>

#include "client/channel.hpp"
#include "client/request.hpp"

namespace py = pybind11;

namespace fc::bindings {
namespace {

using client::Channel;
using client::ChannelOptions;
using client::DeleteRequest;
using client::GetRequest;
using client::KeyColumn;
using client::Outcome;
using client::PutColumn;
using client::PutRequest;
using client::RpcFailure;
using client::Seconds;
using client::Strings;

// ---- errors
// --------------------------------------------------------------------------------------

constexpr const char* kRpcErrorName = "cache_daemon._native.RpcError";

// The class object, made once for the interpreter and never destroyed.
py::handle rpc_error_class() {
  PYBIND11_CONSTINIT static py::gil_safe_call_once_and_store<py::object> storage;
  return storage
      .call_once_and_store_result([]() {
        py::dict members;
        members["code"] = static_cast<int>(2);  // UNKNOWN, until an instance says otherwise
        members["details"] = "";
        members["__module__"] = "cache_daemon._native";
        PyObject* made = PyErr_NewExceptionWithDoc(
            kRpcErrorName, "A call that ended without a reply.", PyExc_Exception, members.ptr());
        if (made == nullptr) throw py::error_already_set();
        return py::reinterpret_steal<py::object>(made);
      })
      .get_stored();
}

// ---- requests
// ------------------------------------------------------------------------------------

// Keeps the Python objects alive whose memory the columns of one request view.
using Keepers = std::vector<py::object>;

constexpr std::size_t kRequestBytesMax = std::numeric_limits<std::int32_t>::max();  // protobuf's

std::string_view view_of_item(PyObject* item, const char* what) {
  if (PyBytes_Check(item)) {
    return {PyBytes_AS_STRING(item), static_cast<std::size_t>(PyBytes_GET_SIZE(item))};
  }
  if (PyUnicode_Check(item)) {
    Py_ssize_t size = 0;
    const char* text = PyUnicode_AsUTF8AndSize(item, &size);  // cached in the string itself
    if (text == nullptr) throw py::error_already_set();
    return {text, static_cast<std::size_t>(size)};
  }
  throw py::value_error(std::string(what) + " must be bytes or str, not " + Py_TYPE(item)->tp_name);
}

// A C-contiguous buffer of bytes-like `object`, kept alive.
std::string_view view_of_buffer(const py::object& object, Keepers& keepers) {
  if (PyBytes_Check(object.ptr())) {
    keepers.push_back(object);
    return view_of_item(object.ptr(), "");
  }
  const py::memoryview memory(object);
  if (PyBuffer_IsContiguous(PyMemoryView_GET_BUFFER(memory.ptr()), 'C') == 0) {
    throw py::value_error("a blob must be C-contiguous");
  }
  keepers.push_back(memory);
  const Py_buffer* buffer = PyMemoryView_GET_BUFFER(memory.ptr());
  return {static_cast<const char*>(buffer->buf), static_cast<std::size_t>(buffer->len)};
}

bool is_array(const py::handle& object) {
  return py::isinstance<py::array>(object);
}

// An integer array as `Wanted`, C-contiguous and one-dimensional; converts only when it must.
template <typename Wanted>
std::span<const Wanted> integers(const py::object& object, const char* what, Keepers& keepers) {
  const auto array = py::array::ensure(object);
  if (!array) throw py::error_already_set();
  const char kind = array.dtype().kind();
  if ((kind != 'i' && kind != 'u' && array.size() > 0) || array.ndim() != 1) {
    throw py::value_error(std::string(what) + " must be a one-dimensional integer array");
  }
  py::array wanted = array;
  const bool same_bits = array.itemsize() == static_cast<py::ssize_t>(sizeof(Wanted)) &&
                         (kind == 'i' || kind == 'u') && array.dtype().byteorder() != '>';
  if (!same_bits || (array.flags() & py::array::c_style) == 0 ||
      reinterpret_cast<std::uintptr_t>(array.data()) % alignof(Wanted) != 0) {
    wanted = py::array_t<Wanted, py::array::c_style | py::array::forcecast>::ensure(array);
    if (!wanted) throw py::error_already_set();
  }
  keepers.push_back(wanted);
  return {static_cast<const Wanted*>(wanted.data()), static_cast<std::size_t>(wanted.size())};
}

Strings strings_of_blob(const py::tuple& pair, const char* what, Keepers& keepers) {
  Strings strings;
  strings.blob = view_of_buffer(pair[0], keepers);
  strings.lengths = integers<std::uint32_t>(pair[1], "lengths", keepers);
  std::uint64_t sum = 0;
  for (const std::uint32_t length : strings.lengths) sum += length;
  if (sum != strings.blob.size()) {
    throw py::value_error(std::string("lengths of ") + what + " add up to " + std::to_string(sum) +
                          ", not to the " + std::to_string(strings.blob.size()) +
                          " bytes of the blob");
  }
  return strings;
}

bool is_blob_pair(const py::object& object) {
  if (!PyTuple_Check(object.ptr()) || PyTuple_GET_SIZE(object.ptr()) != 2) return false;
  PyObject* second = PyTuple_GET_ITEM(object.ptr(), 1);
  return !PyBytes_Check(second) && !PyUnicode_Check(second) && !PyLong_Check(second);
}

Strings strings_of_sequence(const py::object& object, const char* what, Keepers& keepers) {
  // A bare string is a sequence too, of its letters, and always a mistake here.
  if (PyBytes_Check(object.ptr()) || PyUnicode_Check(object.ptr())) {
    throw py::value_error(std::string(what) + " must be a sequence, not one string");
  }
  PyObject* fast = PySequence_Fast(object.ptr(), "neither a sequence nor (blob, lengths)");
  if (fast == nullptr) {
    PyErr_Clear();
    throw py::value_error(std::string(what) +
                          " must be a sequence of bytes or str, or a tuple of " +
                          "a blob and its lengths, not " + Py_TYPE(object.ptr())->tp_name);
  }
  keepers.push_back(py::reinterpret_steal<py::object>(fast));
  const auto count = static_cast<std::size_t>(PySequence_Fast_GET_SIZE(fast));
  PyObject** const items = PySequence_Fast_ITEMS(fast);
  Strings strings;
  strings.parts.reserve(count);
  for (std::size_t i = 0; i < count; ++i) strings.parts.push_back(view_of_item(items[i], what));
  return strings;
}

KeyColumn key_column(const py::handle& name_space, const py::object& keys, const py::handle& domain,
                     Keepers& keepers) {
  KeyColumn column;
  column.name_space = view_of_item(name_space.ptr(), "a namespace");
  column.domain = view_of_item(domain.ptr(), "a domain");
  if (is_blob_pair(keys)) {
    column.keys = strings_of_blob(py::reinterpret_borrow<py::tuple>(keys), "keys", keepers);
  } else if (is_array(keys) && py::reinterpret_borrow<py::array>(keys).dtype().kind() != 'O') {
    column.ids = integers<std::uint64_t>(keys, "keys", keepers);
  } else {
    column.keys = strings_of_sequence(keys, "keys", keepers);
  }
  return column;
}

// One row a key of a C-contiguous array.
Strings strings_of_rows(const py::array& rows, std::vector<std::vector<std::uint32_t>>& lengths,
                        Keepers& keepers) {
  if (rows.ndim() < 1 || (rows.flags() & py::array::c_style) == 0 || rows.dtype().kind() == 'O') {
    throw py::value_error("values must be a C-contiguous array of numbers with one row a key");
  }
  const auto count = static_cast<std::size_t>(rows.shape(0));
  const auto size = static_cast<std::size_t>(rows.nbytes());
  const std::size_t row_bytes = count == 0 ? 0 : size / count;
  if (row_bytes > std::numeric_limits<std::uint32_t>::max()) {
    throw py::value_error("a row of values is too long");
  }
  keepers.push_back(rows);
  lengths.emplace_back(count, static_cast<std::uint32_t>(row_bytes));
  Strings strings;
  strings.blob = {static_cast<const char*>(rows.data()), size};
  strings.lengths = lengths.back();
  return strings;
}

std::uint32_t checked_ttl(std::int64_t ttl_ms) {
  if (ttl_ms < 0 || ttl_ms > std::numeric_limits<std::uint32_t>::max()) {
    throw py::value_error("ttl_ms must be 0 to 4294967295, not " + std::to_string(ttl_ms));
  }
  return static_cast<std::uint32_t>(ttl_ms);
}

std::vector<std::uint32_t> ttls_of(const py::object& ttl_ms, std::size_t keys, Keepers& keepers) {
  if (ttl_ms.is_none()) return {};
  if (PyLong_Check(ttl_ms.ptr())) return {checked_ttl(ttl_ms.cast<std::int64_t>())};
  const auto given = integers<std::int64_t>(ttl_ms, "ttl_ms", keepers);
  if (given.size() != keys) throw py::value_error("ttl_ms needs one entry a key");
  std::vector<std::uint32_t> ttls;
  ttls.reserve(keys);
  for (const std::int64_t ttl : given) ttls.push_back(checked_ttl(ttl));
  return ttls;
}

template <typename Request>
py::bytes encoded(const Request& request) {
  const std::size_t size = request.size();
  if (size > kRequestBytesMax) throw py::value_error("the request is larger than 2 GiB");
  PyObject* bytes = PyBytes_FromStringAndSize(nullptr, static_cast<Py_ssize_t>(size));
  if (bytes == nullptr) throw py::error_already_set();
  request.write(reinterpret_cast<std::uint8_t*>(PyBytes_AS_STRING(bytes)));
  return py::reinterpret_steal<py::bytes>(bytes);
}

py::tuple column_tuple(const py::handle& column, std::size_t size) {
  if (!PyTuple_Check(column.ptr()) ||
      static_cast<std::size_t>(PyTuple_GET_SIZE(column.ptr())) != size) {
    throw py::value_error("each column must be a tuple of " + std::to_string(size));
  }
  return py::reinterpret_borrow<py::tuple>(column);
}

py::bytes encode_get(const py::sequence& columns, std::uint64_t request_id, bool cache_only) {
  Keepers keepers;
  GetRequest request{.request_id = request_id, .cache_only = cache_only, .columns = {}};
  for (const py::handle item : columns) {
    const py::tuple column = column_tuple(item, 3);
    keepers.push_back(column);
    request.columns.push_back(key_column(column[0], column[1], column[2], keepers));
  }
  return encoded(request);
}

py::bytes encode_delete(const py::sequence& columns) {
  Keepers keepers;
  DeleteRequest request;
  for (const py::handle item : columns) {
    const py::tuple column = column_tuple(item, 3);
    keepers.push_back(column);
    request.columns.push_back(key_column(column[0], column[1], column[2], keepers));
  }
  return encoded(request);
}

py::bytes encode_put(const py::sequence& columns) {
  Keepers keepers;
  std::vector<std::vector<std::uint32_t>> row_lengths;
  row_lengths.reserve(columns.size());  // views into its elements must stay
  PutRequest request;
  for (const py::handle item : columns) {
    const py::tuple column = column_tuple(item, 5);
    keepers.push_back(column);
    PutColumn& put = request.columns.emplace_back();
    put.keys = key_column(column[0], column[1], column[2], keepers);
    const py::object values = column[3];
    if (is_blob_pair(values)) {
      put.values = strings_of_blob(py::reinterpret_borrow<py::tuple>(values), "values", keepers);
    } else if (is_array(values)) {
      put.values = strings_of_rows(py::reinterpret_borrow<py::array>(values), row_lengths, keepers);
    } else {
      put.values = strings_of_sequence(values, "values", keepers);
    }
    if (put.values.count() != put.keys.count()) {
      throw py::value_error(std::to_string(put.keys.count()) + " keys with " +
                            std::to_string(put.values.count()) + " values");
    }
    put.ttl_ms = ttls_of(column[4], put.keys.count(), keepers);
  }
  return encoded(request);
}

// ---- replies
// -------------------------------------------------------------------------------------

// A read-only array over `span` that keeps `owner` alive.
template <typename T>
py::array_t<T> array_view(std::span<const T> span, const py::object& owner) {
  py::array_t<T> array({static_cast<py::ssize_t>(span.size())}, {py::ssize_t{sizeof(T)}},
                       span.data(), owner);
  py::detail::array_proxy(array.ptr())->flags &= ~py::detail::npy_api::NPY_ARRAY_WRITEABLE_;
  return array;
}

const Reply::Column& column_of(const Reply& reply, std::size_t index) {
  if (index >= reply.columns()) throw py::index_error("the reply has no such column");
  return reply.column(index);
}

py::list as_bytes(const Reply& reply, std::size_t index) {
  const Reply::Column& column = column_of(reply, index);
  py::list values(column.statuses.size());
  const auto* at = reinterpret_cast<const char*>(column.values.data());
  for (std::size_t i = 0; i < column.statuses.size(); ++i) {
    const auto length = static_cast<Py_ssize_t>(column.value_lengths[i]);
    PyObject* value = nullptr;
    if (carries_value(static_cast<CellStatus>(column.statuses[i]))) {
      value = PyBytes_FromStringAndSize(at, length);
      if (value == nullptr) throw py::error_already_set();
    } else {
      value = py::none().release().ptr();
    }
    PyList_SET_ITEM(values.ptr(), static_cast<Py_ssize_t>(i), value);
    at += length;
  }
  return values;
}

// Copies values of exactly `row_bytes` into their rows; zeroes the others.
void gather_rows(const Reply::Column& column, std::size_t row_bytes, std::uint8_t* out,
                 bool* valid) {
  const std::uint8_t* at = column.values.data();
  for (std::size_t i = 0; i < column.statuses.size(); ++i, out += row_bytes) {
    const std::size_t length = column.value_lengths[i];
    valid[i] = length == row_bytes && carries_value(static_cast<CellStatus>(column.statuses[i]));
    if (row_bytes > 0 && valid[i]) std::memcpy(out, at, row_bytes);
    if (row_bytes > 0 && !valid[i]) std::memset(out, 0, row_bytes);
    at += length;
  }
}

void gather(const Reply& reply, std::size_t index, py::array_t<std::uint8_t, 0>& out,
            py::array_t<bool, 0>& valid) {
  const Reply::Column& column = column_of(reply, index);
  const auto keys = static_cast<py::ssize_t>(column.statuses.size());
  if (out.ndim() != 2 || out.shape(0) != keys || (out.flags() & py::array::c_style) == 0 ||
      valid.ndim() != 1 || valid.shape(0) != keys || (valid.flags() & py::array::c_style) == 0) {
    throw py::value_error(
        "out must be C-contiguous with one row a key, valid with one entry a key");
  }
  std::uint8_t* const rows = out.mutable_data();  // throws when read-only
  bool* const flags = valid.mutable_data();
  const auto row_bytes = static_cast<std::size_t>(out.shape(1));
  const py::gil_scoped_release unlocked;
  gather_rows(column, row_bytes, rows, flags);
}

// ---- the channel
// ---------------------------------------------------------------------------------

Seconds checked_timeout(double timeout_s) {
  if (std::isnan(timeout_s)) throw py::value_error("timeout_s must be a number");
  return Seconds(timeout_s);
}

std::string_view view_of(const py::bytes& request) {
  return view_of_item(request.ptr(), "");
}

template <typename Answer>
Answer answer_or_raise(Outcome<Answer> outcome) {
  if (const auto* failure = std::get_if<RpcFailure>(&outcome)) {
    raise_rpc_error(failure->code, failure->details);
  }
  return std::get<Answer>(std::move(outcome));
}

template <typename Answer, auto Method>
Answer call(Channel& channel, const py::bytes& request, double timeout_s) {
  const Seconds timeout = checked_timeout(timeout_s);
  const std::string_view bytes = view_of(request);  // immutable, and kept by the caller
  std::optional<Outcome<Answer>> outcome;
  {
    const py::gil_scoped_release unlocked;  // others run Python while this waits
    outcome.emplace((channel.*Method)(bytes, timeout));
  }
  return answer_or_raise(std::move(*outcome));
}

// A Python callable that a thread without the GIL may own and drop.
class Callback {
 public:
  explicit Callback(py::function function)
      : function_(new py::function(std::move(function)), [](py::function* held) {
          const py::gil_scoped_acquire locked;
          delete held;
        }) {}

  template <typename Answer>
  void operator()(Outcome<Answer> outcome) const {
    const py::gil_scoped_acquire locked;
    try {
      if (const auto* failure = std::get_if<RpcFailure>(&outcome)) {
        (*function_)(make_rpc_error(failure->code, failure->details));
      } else {
        (*function_)(std::get<Answer>(std::move(outcome)));
      }
    } catch (py::error_already_set& error) {
      error.discard_as_unraisable("the callback of an asynchronous call");
    }
  }

 private:
  std::shared_ptr<py::function> function_;
};

template <typename Answer, auto Method>
void call_async(Channel& channel, const py::bytes& request, double timeout_s, py::function done) {
  const Seconds timeout = checked_timeout(timeout_s);
  const std::string_view bytes = view_of(request);
  Callback callback(std::move(done));
  const py::gil_scoped_release unlocked;
  (channel.*Method)(bytes, timeout, [callback = std::move(callback)](Outcome<Answer> outcome) {
    callback(std::move(outcome));
  });
}

// Every channel that lives, so that all can be closed before the interpreter goes: a callback that
// wants the GIL after that ends the process.
class LiveChannels {
 public:
  void add(const std::shared_ptr<Channel>& channel) {
    const std::lock_guard lock(mutex_);
    std::erase_if(channels_, [](const std::weak_ptr<Channel>& held) { return held.expired(); });
    channels_.push_back(channel);
  }

  void close_all() {
    std::vector<std::shared_ptr<Channel>> open;
    {
      const std::lock_guard lock(mutex_);
      for (const auto& held : channels_) {
        if (auto channel = held.lock()) open.push_back(std::move(channel));
      }
    }
    for (const auto& channel : open) channel->close();
  }

 private:
  std::mutex mutex_;
  std::vector<std::weak_ptr<Channel>> channels_;
};

LiveChannels& live_channels() {
  static auto* instance = new LiveChannels();  // never destroyed: channels may outlive main()
  return *instance;
}

std::shared_ptr<Channel> make_channel(const std::string& target,
                                      const std::optional<py::bytes>& root_certificates,
                                      const std::optional<py::bytes>& private_key,
                                      const std::optional<py::bytes>& certificate_chain,
                                      const std::string& server_name, int max_message_bytes) {
  const auto text = [](const std::optional<py::bytes>& bytes) {
    return bytes ? std::optional<std::string>(*bytes) : std::nullopt;
  };
  auto channel =
      std::make_shared<Channel>(target, ChannelOptions{.root_certificates = text(root_certificates),
                                                       .private_key = text(private_key),
                                                       .certificate_chain = text(certificate_chain),
                                                       .server_name = server_name,
                                                       .max_message_bytes = max_message_bytes});
  live_channels().add(channel);
  return channel;
}

void bind_replies(py::module_& module) {
  py::class_<Reply>(module, "Reply", py::is_final(),
                    "A BatchGetResponse; its arrays are read-only views into it.")
      .def_property_readonly("request_id", &Reply::request_id)
      .def_property_readonly("columns", &Reply::columns)
      .def(
          "statuses",
          [](const py::object& self, std::size_t column) {
            return array_view(column_of(self.cast<const Reply&>(), column).statuses, self);
          },
          py::arg("column"))
      .def(
          "value_lengths",
          [](const py::object& self, std::size_t column) {
            return array_view(column_of(self.cast<const Reply&>(), column).value_lengths, self);
          },
          py::arg("column"))
      .def(
          "values",
          [](const py::object& self, std::size_t column) {
            return array_view(column_of(self.cast<const Reply&>(), column).values, self);
          },
          py::arg("column"))
      .def("as_bytes", &as_bytes, py::arg("column"))
      .def("gather", &gather, py::arg("column"), py::arg("out").noconvert(),
           py::arg("valid").noconvert());
  py::class_<WriteReply>(module, "WriteReply", py::is_final(),
                         "A BatchWriteResponse: one status a key.")
      .def_property_readonly("columns", &WriteReply::columns)
      .def(
          "statuses",
          [](const py::object& self, std::size_t column) {
            const auto& reply = self.cast<const WriteReply&>();
            if (column >= reply.columns()) throw py::index_error("the reply has no such column");
            return array_view(reply.statuses(column), self);
          },
          py::arg("column"));
}

void bind_channel(py::module_& module) {
  // Closing waits for calls under way, whose callbacks need the GIL to end.
  py::class_<Channel, std::shared_ptr<Channel>>(
      module, "Channel", py::is_final(), py::release_gil_before_calling_cpp_dtor(),
      "One native gRPC connection to a FeatureCache service.")
      .def(py::init(&make_channel), py::arg("target"), py::kw_only(),
           py::arg("root_certificates") = py::none(), py::arg("private_key") = py::none(),
           py::arg("certificate_chain") = py::none(), py::arg("server_name") = "",
           py::arg("max_message_bytes") = 64 << 20)
      .def("batch_get", &call<Reply, &Channel::batch_get>, py::arg("request"), py::arg("timeout_s"))
      .def("batch_put", &call<WriteReply, &Channel::batch_put>, py::arg("request"),
           py::arg("timeout_s"))
      .def("batch_delete", &call<WriteReply, &Channel::batch_delete>, py::arg("request"),
           py::arg("timeout_s"))
      .def("batch_get_async", &call_async<Reply, &Channel::batch_get_async>, py::arg("request"),
           py::arg("timeout_s"), py::arg("done"))
      .def("batch_put_async", &call_async<WriteReply, &Channel::batch_put_async>,
           py::arg("request"), py::arg("timeout_s"), py::arg("done"))
      .def("batch_delete_async", &call_async<WriteReply, &Channel::batch_delete_async>,
           py::arg("request"), py::arg("timeout_s"), py::arg("done"))
      .def("close", &Channel::close, py::call_guard<py::gil_scoped_release>());
}

}  // namespace

py::object make_rpc_error(int code, const std::string& details) {
  // Details come from the wire and may be anything.
  PyObject* text = PyUnicode_DecodeUTF8(details.data(), static_cast<Py_ssize_t>(details.size()),
                                        "backslashreplace");
  if (text == nullptr) throw py::error_already_set();
  const auto held = py::reinterpret_steal<py::object>(text);
  py::object error = rpc_error_class()(held);
  error.attr("code") = code;
  error.attr("details") = held;
  return error;
}

void raise_rpc_error(int code, const std::string& details) {
  const py::object error = make_rpc_error(code, details);
  PyErr_SetObject(rpc_error_class().ptr(), error.ptr());
  throw py::error_already_set();
}

}  // namespace fc::bindings

void bind_client(py::module_& module) {
  module.attr("RpcError") = fc::bindings::rpc_error_class();
  py::module_::import("atexit").attr("register")(py::cpp_function([] {
    const py::gil_scoped_release unlocked;
    fc::bindings::live_channels().close_all();
  }));
  fc::bindings::bind_replies(module);
  fc::bindings::bind_channel(module);
  module.def("encode_get", &fc::bindings::encode_get, py::arg("columns"), py::kw_only(),
             py::arg("request_id") = 0, py::arg("cache_only") = false);
  module.def("encode_put", &fc::bindings::encode_put, py::arg("columns"));
  module.def("encode_delete", &fc::bindings::encode_delete, py::arg("columns"));
}

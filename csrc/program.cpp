// torch.classes.fastconv.Program: a list of operator calls that one call runs.
//
// Each call is an operator of PyTorch's registry with its arguments bound: tensors that stay the same (weights, static
// buffers), plain values, and slots, which hold what earlier calls returned or what the caller put in. Running it costs
// a copy of the arguments and the operator's own boxed call, under a microsecond: that is what Python, autograd and the
// allocation of every result cost otherwise.

#include <ATen/core/dispatch/Dispatcher.h>
#include <torch/custom_class.h>
#include <torch/library.h>

#include <algorithm>
#include <chrono>
#include <limits>
#include <map>
#include <memory>
#include <utility>

#include "host/tensor.h"
#include "lanes.h"

namespace fastconv {
namespace {

class Program : public torch::CustomClassHolder {
 public:
  explicit Program(int64_t slots) : slots_(check_slots(slots)) {}

  // Appends a call. arguments: one for each of the schema's. inputs: triples (argument, element, slot): that argument,
  // or that element of a list of tensors (-1: the argument is no list), is taken from the slot at every run. results:
  // the slots of what the call returns (-1: dropped), or none.
  void call(const std::string& name, const std::string& overload, const c10::List<c10::IValue>& arguments,
            const std::vector<int64_t>& inputs, const std::vector<int64_t>& results) {
    const auto op = c10::Dispatcher::singleton().findSchemaOrThrow(name.c_str(), overload.c_str());
    const size_t wanted = op.schema().arguments().size();
    TORCH_CHECK(arguments.size() == wanted, "Program: ", name, " expected ", wanted, " arguments, got ",
                arguments.size());
    TORCH_CHECK(results.empty() || results.size() == op.schema().returns().size(), "Program: results of ", name,
                " expected ", op.schema().returns().size(), " entries, got ", results.size());
    TORCH_CHECK(inputs.size() % 3 == 0, "Program: inputs expected triples, got ", inputs.size(), " integers");
    Call c{op, {}, {}, results, {}, false};
    for (size_t i = 0; i < wanted; ++i) {
      const c10::IValue v = arguments.get(i);
      // An empty list of Python has no element type: it comes as None.
      const bool empty = v.isNone() && op.schema().arguments()[i].type()->isSubtypeOf(*c10::ListType::ofTensors());
      c.arguments.push_back(empty ? c10::IValue(c10::List<at::Tensor>()) : v);
    }
    for (size_t i = 0; i < inputs.size(); i += 3) {
      const int64_t argument = inputs[i], element = inputs[i + 1];
      TORCH_CHECK_INDEX(argument >= 0 && argument < static_cast<int64_t>(wanted),
                        "Program: inputs expected arguments below ", wanted, ", got ", argument);
      if (element >= 0) {
        TORCH_CHECK(c.arguments[argument].isTensorList(), "Program: argument ", argument, " of ", name,
                    " expected a list of tensors");
        const size_t size = c.arguments[argument].toTensorList().size();
        TORCH_CHECK_INDEX(element < static_cast<int64_t>(size), "Program: inputs expected elements below ", size,
                          ", got ", element);
      }
      c.inputs.push_back({argument, element, at(inputs[i + 2])});
    }
    for (const int64_t r : results) {
      if (r >= 0) at(r);
    }
    calls_.push_back(std::move(c));
  }

  void put(int64_t slot, const at::Tensor& value) { slots_[at(slot)] = value; }
  at::Tensor get(int64_t slot) const { return slots_[at(slot)].toTensor(); }
  // The same, and the slot is empty then.
  at::Tensor take(int64_t slot) { return std::exchange(slots_[at(slot)], c10::IValue()).toTensor(); }
  // The same for many slots: a call from Python costs as much as a few operators.
  void put_all(const std::vector<int64_t>& slots, const std::vector<at::Tensor>& values) {
    TORCH_CHECK(slots.size() == values.size(), "Program: values expected ", slots.size(), ", got ", values.size());
    for (size_t i = 0; i < slots.size(); ++i) put(slots[i], values[i]);
  }
  std::vector<at::Tensor> get_all(const std::vector<int64_t>& slots) const {
    std::vector<at::Tensor> values;
    values.reserve(slots.size());
    for (const int64_t slot : slots) values.push_back(get(slot));
    return values;
  }
  void clear() { std::fill(slots_.begin(), slots_.end(), c10::IValue()); }
  // Empties these slots behind a call, whenever it has run: their tensors' last reader.
  void release(int64_t call, const std::vector<int64_t>& slots) {
    TORCH_CHECK_INDEX(call >= 0 && call < size(), "Program: call expected below ", size(), ", got ", call);
    for (const int64_t slot : slots) calls_[call].released.push_back(at(slot));
  }
  // The call runs aside (lanes.h): beside those after it, until the call `join` or, where that is size(), until the
  // end. device: of the second stream. The program has all its calls by then.
  void aside(int64_t call, int64_t join, c10::Device device) {
    TORCH_CHECK_INDEX(call >= 0 && call < size(), "Program: call expected below ", size(), ", got ", call);
    TORCH_CHECK_INDEX(join > call && join <= size(), "Program: join expected above ", call, " and at most ", size(),
                      ", got ", join);
    if (!lanes_) lanes_ = std::make_unique<Lanes>(device, c10::impl::VirtualGuardImpl(device.type()));
    calls_[call].aside = true;
    joins_[join] = std::max(joins_[join], call);
  }
  int64_t size() const { return static_cast<int64_t>(calls_.size()); }

  void run() {
    run_calls([](size_t) {});
  }

  // Runs the calls from `first` up to, and without, `end`, of a program without calls aside.
  void run_part(int64_t first, int64_t end) {
    TORCH_CHECK_INDEX(0 <= first && first <= end && end <= size(), "Program: calls expected within ", size(), ", got ",
                      first, " to ", end);
    TORCH_CHECK(!lanes_, "Program: run_part expected a program without calls aside");
    const PlainDispatch guard;
    torch::jit::Stack stack;
    for (int64_t call = first; call < end; ++call) run_call(calls_[call], stack);
  }

  // Runs it `runs` times; microseconds of each call, the least of all runs.
  std::vector<double> times(int64_t runs) {
    using Clock = std::chrono::steady_clock;
    std::vector<double> least(calls_.size(), std::numeric_limits<double>::infinity());
    for (int64_t i = 0; i < runs; ++i) {
      Clock::time_point before = Clock::now();
      run_calls([&](size_t call) {
        const Clock::time_point now = Clock::now();
        least[call] = std::min(least[call], std::chrono::duration<double, std::micro>(now - before).count());
        before = now;
      });
    }
    return least;
  }

 private:
  template <class After>
  void run_calls(const After& after) {
    const PlainDispatch guard;
    torch::jit::Stack stack;
    auto next = joins_.begin();
    const auto join = [&](size_t call) {
      for (; next != joins_.end() && next->first <= static_cast<int64_t>(call); ++next) lanes_->join(next->second);
    };
    try {
      for (size_t call = 0; call < calls_.size(); ++call) {
        join(call);
        if (calls_[call].aside) {
          lanes_->aside(call, [this, call, &stack] { run_call(calls_[call], stack); });
        } else {
          run_call(calls_[call], stack);
        }
        after(call);
      }
      join(calls_.size());
    } catch (...) {
      if (lanes_) lanes_->abandon();
      throw;
    }
  }

  struct Input {
    int64_t argument, element, slot;
  };
  struct Call {
    c10::OperatorHandle op;
    std::vector<c10::IValue> arguments;
    std::vector<Input> inputs;
    std::vector<int64_t> results, released;
    bool aside = false;
  };

  void run_call(const Call& c, torch::jit::Stack& stack) {
    stack.assign(c.arguments.begin(), c.arguments.end());
    for (const Input& in : c.inputs) {
      if (in.element < 0) {
        stack[in.argument] = slots_[in.slot];
      } else {  // the list is this call's own: it is overwritten at every run
        stack[in.argument].toTensorList().set(in.element, slots_[in.slot].toTensor());
      }
    }
    c.op.callBoxed(stack);
    for (size_t i = 0; i < c.results.size(); ++i) {
      if (c.results[i] >= 0) slots_[c.results[i]] = std::move(stack[i]);
    }
    for (const int64_t slot : c.released) slots_[slot] = c10::IValue();
    for (const Input& in : c.inputs) {  // a bound list would hold what it was given for this run
      if (in.element >= 0) c.arguments[in.argument].toTensorList().set(in.element, at::Tensor());
    }
  }

  static size_t check_slots(int64_t slots) {
    TORCH_CHECK_VALUE(slots >= 0, "Program: slots expected at least 0, got ", slots);
    return static_cast<size_t>(slots);
  }
  int64_t at(int64_t slot) const {
    TORCH_CHECK_INDEX(slot >= 0 && slot < static_cast<int64_t>(slots_.size()), "Program: slot expected below ",
                      slots_.size(), ", got ", slot);
    return slot;
  }

  std::vector<c10::IValue> slots_;
  std::vector<Call> calls_;
  std::map<int64_t, int64_t> joins_;  // call: the last one aside that it waits for
  std::unique_ptr<Lanes> lanes_;      // of a program with calls aside
};

}  // namespace

TORCH_LIBRARY_FRAGMENT(fastconv, m) {
  m.class_<Program>("Program")
      .def(torch::init<int64_t>())
      .def("call", &Program::call)
      .def("put", &Program::put)
      .def("get", &Program::get)
      .def("take", &Program::take)
      .def("put_all", &Program::put_all)
      .def("get_all", &Program::get_all)
      .def("clear", &Program::clear)
      .def("release", &Program::release)
      .def("aside", &Program::aside)
      .def("size", &Program::size)
      .def("run", &Program::run)
      .def("run_part", &Program::run_part)
      .def("times", &Program::times);
}

}  // namespace fastconv

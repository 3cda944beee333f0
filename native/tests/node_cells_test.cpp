// The parts that a node's NVM cells go through, each by itself: which answer a cell takes when a
// read and a speculative lookup are out, the budget of speculative lookups, and a flight that is
// raised in its store's queue.

#include <array>

#include "node_support.hpp"
#include "upstream/pending_get.hpp"
#include "upstream/speculation.hpp"
#include "upstream/store_queue.hpp"

namespace fc::testing {
namespace {

// ---- one cell, two that may answer it
// -----------------------------------------------------------

// One request of one column whose cells are all on NVM; the tests are its engine and its flights.
class CellsTest : public ::testing::Test {
 protected:
  void SetUp() override { make({"k"}); }

  void make(const std::vector<std::string>& keys, bool fetchable = true,
            std::uint64_t max_reply_bytes = kMiB) {
    client::GetRequest request;
    request.columns.push_back(column_of("pin", keys));
    answer_.reset();
    get_ = std::make_shared<PendingGet>(
        encoded(request), max_reply_bytes,
        [this](const PendingGet& ended) {
          won_by_store_ = ended.columns[0].won_by_store;
          won_by_nvm_ = ended.columns[0].won_by_nvm;
        },
        [this](CallStatus call, const std::vector<Buffer>& pieces) {
          EXPECT_FALSE(answer_.has_value()) << "answered twice";
          answer_ = parsed(std::move(call), pieces);
        });
    ASSERT_EQ(wire::decode(get_->bytes().bytes, {}, get_->request), "");
    get_->columns.resize(1);
    get_->columns[0].fetchable = fetchable;
    get_->columns[0].statuses.resize(keys.size());
    get_->columns[0].lengths.resize(keys.size());
    std::vector<NvmCell> cells;
    for (std::uint32_t i = 0; i < keys.size(); ++i) cells.push_back(cell_at(i));
    get_->expect_reads(cells);
    get_->start(cells.size());
  }
  NvmCell cell_at(std::uint32_t position) const {
    NvmCell on_nvm;
    on_nvm.key = get_->request.columns[0].keys[position];
    on_nvm.position = position;
    return on_nvm;
  }
  PendingGet::NotRead read(CellStatus status, std::string_view value = {},
                           std::uint32_t position = 0) {
    answers_ = {{cell_at(position),
                 status,
                 {reinterpret_cast<const std::uint8_t*>(value.data()), value.size()}}};
    return get_->answer(answers_);
  }
  void flight(CellStatus status, std::string_view value = {}, std::uint32_t position = 0) {
    auto bytes = std::make_shared<Buffer>();
    bytes->append(value.data(), value.size());
    get_->answer(0, position, status, {bytes, 0, static_cast<std::uint32_t>(value.size())});
  }
  bool ask(std::uint32_t position = 0) {
    const NvmCell late = cell_at(position);
    return get_->begin_asking({&late, 1}).size() == 1;
  }
  Cell only() const {
    return answer_.has_value() ? answer_->only() : cell(CellStatus::Unspecified);
  }
  std::vector<Cell> all() const {
    return answer_.has_value() ? answer_->columns.at(0) : std::vector<Cell>{};
  }
  const Cell waits_ = cell(CellStatus::Unspecified);

  std::shared_ptr<PendingGet> get_;
  std::vector<NvmAnswer> answers_;
  std::optional<Answer> answer_;
  std::uint32_t won_by_store_ = 0;
  std::uint32_t won_by_nvm_ = 0;
};

TEST_F(CellsTest, ReadAloneAnswers) {
  read(CellStatus::HitNvm, "v");
  EXPECT_EQ(only(), cell(CellStatus::HitNvm, "v"));
  make({"k"});
  read(CellStatus::HitDram, "moved");
  EXPECT_EQ(only(), cell(CellStatus::HitDram, "moved"));
  make({"k"});
  read(CellStatus::HitNvm);
  EXPECT_EQ(only(), cell(CellStatus::HitNvm)) << "an empty value is a value";
  make({"k"});
  read(CellStatus::NotFound);
  EXPECT_EQ(only(), cell(CellStatus::NotFound));
  make({"k"});
  read(CellStatus::Throttled);
  EXPECT_EQ(only(), cell(CellStatus::Throttled)) << "a full queue of reads is no miss";
  EXPECT_EQ(won_by_nvm_, 0U) << "nobody else was asked";
}

TEST_F(CellsTest, MissIsFetchedWhereThatIsAllowed) {
  const PendingGet::NotRead missed = read(CellStatus::Miss);
  ASSERT_EQ(missed.absent.size(), 1U);
  EXPECT_EQ(only(), waits_);
  flight(CellStatus::Fetched, "v");
  EXPECT_EQ(only(), cell(CellStatus::Fetched, "v"));
  make({"k"}, false);
  EXPECT_FALSE(ask());
  EXPECT_TRUE(read(CellStatus::Miss).absent.empty());
  EXPECT_EQ(only(), cell(CellStatus::Miss));
}

TEST_F(CellsTest, FailedFetchOfAMissAnswers) {
  for (const CellStatus failure :
       {CellStatus::Error, CellStatus::Throttled, CellStatus::TimedOut, CellStatus::NotFound}) {
    make({"k"});
    read(CellStatus::Miss);
    flight(failure);
    EXPECT_EQ(only(), cell(failure));
  }
}

TEST_F(CellsTest, LookupBeforeTheReadAnswers) {
  ASSERT_TRUE(ask());
  flight(CellStatus::Fetched, "store's");
  EXPECT_EQ(only(), cell(CellStatus::Speculative, "store's"));
  EXPECT_EQ(won_by_store_, 1U);
  for (const CellStatus late : {CellStatus::HitNvm, CellStatus::NotFound, CellStatus::Miss}) {
    const PendingGet::NotRead ignored = read(late, late == CellStatus::HitNvm ? "ssd's" : "");
    EXPECT_TRUE(ignored.absent.empty() && ignored.asked.empty());
  }
  make({"k"});
  ASSERT_TRUE(ask());
  flight(CellStatus::NotFound);
  EXPECT_EQ(only(), cell(CellStatus::NotFound));
  EXPECT_EQ(won_by_store_, 1U);
  make({"k"});
  ASSERT_TRUE(ask());
  flight(CellStatus::HitDram, "found by a second look");
  EXPECT_EQ(only(), cell(CellStatus::HitDram, "found by a second look"));
  EXPECT_EQ(won_by_store_, 0U);
}

// Of two cells, one is answered early, so that late answers meet a request that still waits.
TEST_F(CellsTest, SecondAnswerOfACellIsIgnoredWhileOthersWait) {
  make({"a", "b", "c"});
  ASSERT_TRUE(ask(0) && ask(1));
  flight(CellStatus::Fetched, "A of the store", 0);
  read(CellStatus::HitNvm, "A of the SSD", 0);
  read(CellStatus::HitNvm, "B of the SSD", 1);
  flight(CellStatus::Fetched, "B of the store", 1);
  EXPECT_EQ(only(), waits_);
  EXPECT_FALSE(ask(0) || ask(1)) << "they are answered";
  read(CellStatus::HitNvm, "C", 2);
  EXPECT_EQ(all(), (std::vector<Cell>{cell(CellStatus::Speculative, "A of the store"),
                                      cell(CellStatus::HitNvm, "B of the SSD"),
                                      cell(CellStatus::HitNvm, "C")}));
  EXPECT_EQ(won_by_store_, 1U);
  EXPECT_EQ(won_by_nvm_, 1U);
}

TEST_F(CellsTest, ReadBeforeTheLookupAnswers) {
  for (const CellStatus status : {CellStatus::HitNvm, CellStatus::HitDram, CellStatus::NotFound}) {
    make({"k"});
    ASSERT_TRUE(ask());
    read(status, carries_value(status) ? "v" : "");
    EXPECT_EQ(only(), cell(status, carries_value(status) ? "v" : ""));
    EXPECT_EQ(won_by_nvm_, 1U);
    flight(CellStatus::Fetched, "too late");
  }
}

TEST_F(CellsTest, FailedLookupLeavesTheAnswerToTheRead) {
  for (const CellStatus failure :
       {CellStatus::Error, CellStatus::Throttled, CellStatus::TimedOut}) {
    make({"k"});
    ASSERT_TRUE(ask());
    flight(failure);
    EXPECT_EQ(only(), waits_);
    read(CellStatus::HitNvm, "v");
    EXPECT_EQ(only(), cell(CellStatus::HitNvm, "v"));
    EXPECT_EQ(won_by_nvm_, 0U) << "the lookup was over";

    make({"k"});
    ASSERT_TRUE(ask());
    flight(failure);
    EXPECT_EQ(read(CellStatus::Miss).absent.size(), 1U) << "an ordinary miss from here on";
    EXPECT_EQ(only(), waits_);
    flight(CellStatus::Fetched, "second try");
    EXPECT_EQ(only(), cell(CellStatus::Fetched, "second try"));
  }
}

TEST_F(CellsTest, MissLeavesTheAnswerToTheLookupUnderWay) {
  for (const CellStatus status : {CellStatus::Fetched, CellStatus::NotFound, CellStatus::Error,
                                  CellStatus::Throttled, CellStatus::TimedOut}) {
    make({"k"});
    ASSERT_TRUE(ask());
    const PendingGet::NotRead missed = read(CellStatus::Miss);
    EXPECT_TRUE(missed.absent.empty()) << "it must not be fetched twice";
    EXPECT_EQ(missed.asked.size(), 1U);
    EXPECT_EQ(only(), waits_);
    flight(status, carries_value(status) ? "v" : "");
    EXPECT_EQ(only(), cell(status, carries_value(status) ? "v" : ""))
        << "FETCHED, not SPECULATIVE: the read had nothing to lose to";
    EXPECT_EQ(won_by_store_ + won_by_nvm_, 0U);
  }
}

TEST_F(CellsTest, GivenUpLookupsAreForgotten) {
  ASSERT_TRUE(ask());
  EXPECT_FALSE(ask()) << "one at a time";
  const NvmCell late = cell_at(0);
  get_->give_up_asking({&late, 1});
  EXPECT_EQ(read(CellStatus::Miss).absent.size(), 1U);
  EXPECT_FALSE(ask()) << "its read is over";
}

TEST_F(CellsTest, EndedRequestIgnoresWhatComesLate) {
  make({"a", "b"});
  ASSERT_TRUE(ask(0));
  read(CellStatus::HitNvm, "A", 0);
  get_->expire();
  EXPECT_EQ(all(), (std::vector<Cell>{cell(CellStatus::HitNvm, "A"), cell(CellStatus::TimedOut)}));
  EXPECT_TRUE(get_->ended());
  EXPECT_FALSE(ask(1));
  EXPECT_TRUE(read(CellStatus::Miss, {}, 1).absent.empty());
  flight(CellStatus::Fetched, "late", 0);
}

TEST_F(CellsTest, ReadsBringNoMoreThanAReplyCarries) {
  make({"a", "b", "c"}, true, 1'000);
  read(CellStatus::HitNvm, std::string(600, 'a'), 0);
  read(CellStatus::HitNvm, std::string(600, 'b'), 1);
  read(CellStatus::HitNvm, std::string(400, 'c'), 2);
  EXPECT_EQ(all(), (std::vector<Cell>{cell(CellStatus::HitNvm, std::string(600, 'a')),
                                      cell(CellStatus::Throttled),
                                      cell(CellStatus::HitNvm, std::string(400, 'c'))}));
}

TEST_F(CellsTest, AnswersOfOneCallShareABufferAndComeInKeyOrder) {
  make({"a", "b", "c", "d"});
  const auto bytes_of = [](std::string_view value) {
    return std::span(reinterpret_cast<const std::uint8_t*>(value.data()), value.size());
  };
  answers_ = {{cell_at(3), CellStatus::HitNvm, bytes_of("D")},
              {cell_at(1), CellStatus::Miss, {}},
              {cell_at(2), CellStatus::NotFound, {}},
              {cell_at(0), CellStatus::HitNvm, bytes_of("AA")}};
  const PendingGet::NotRead missed = get_->answer(answers_);
  ASSERT_EQ(missed.absent.size(), 1U);
  EXPECT_EQ(missed.absent[0]->cell.position, 1U);
  ASSERT_EQ(get_->columns[0].late.size(), 4U);
  EXPECT_EQ(get_->columns[0].late[0], get_->columns[0].late[3] + 1);
  flight(CellStatus::Fetched, "BBB", 1);
  EXPECT_EQ(all(),
            (std::vector<Cell>{cell(CellStatus::HitNvm, "AA"), cell(CellStatus::Fetched, "BBB"),
                               cell(CellStatus::NotFound), cell(CellStatus::HitNvm, "D")}));
}

// ---- the budget
// -----------------------------------------------------------------------------------

constexpr std::uint64_t kSecond = 1'000'000'000;
constexpr std::uint64_t kHour = 3600 * kSecond;

TEST(SpeculationBudgetTest, IsAShareOfTheKeysAsked) {
  SpeculationBudget budget(0.05);
  EXPECT_EQ(budget.take(kHour, 100), 0U) << "nothing was asked";
  budget.asked(kHour, 19);
  EXPECT_EQ(budget.take(kHour, 100), 0U) << "one of 19 would be more than 5 %";
  budget.asked(kHour, 1);
  EXPECT_EQ(budget.take(kHour, 100), 1U);
  budget.asked(kHour, 1'000);
  EXPECT_EQ(budget.take(kHour, 30), 30U);
  EXPECT_EQ(budget.take(kHour, 30), 20U);
  EXPECT_EQ(budget.take(kHour, 30), 0U);
}

TEST(SpeculationBudgetTest, SavesNothingUp) {
  SpeculationBudget budget(0.1);
  std::uint64_t now = kHour;
  for (int i = 0; i < 100; ++i, now += kSecond / 10) budget.asked(now, 100);
  EXPECT_EQ(budget.take(now - 1, 1'000), 100U) << "ten idle seconds give what one gives";
  now += 30 * kSecond;
  budget.asked(now, 50);
  EXPECT_EQ(budget.take(now, 1'000), 5U);
  now += kHour;
  EXPECT_EQ(budget.take(now, 1'000), 0U);
  budget.asked(now, 10);
  EXPECT_EQ(budget.take(now, 1'000), 1U);
}

// Whenever one is launched: those of the second before are at most the share of that second's keys.
TEST(SpeculationBudgetTest, HoldsAtEverySecond) {
  std::mt19937_64 random(seed_of(41));
  constexpr double kShare = 0.07;
  SpeculationBudget budget(kShare);
  struct Event {
    std::uint64_t at;
    std::uint64_t asked;
    std::uint64_t launched;
  };
  std::vector<Event> events;
  std::uint64_t now = kHour;
  std::uint64_t most_keys = 1'000;
  std::uint64_t total = 0;
  for (int step = 0; step < 20'000; ++step) {
    // Busy, quiet and idle times by turns, on a scale on which windows often begin and end.
    now += random() % (random() % 50 == 0 ? 3 * kSecond : kSecond / 20);
    if (random() % 200 == 0) most_keys = random() % 3 == 0 ? 10 : 5'000;
    const std::uint64_t asked = random() % most_keys;
    budget.asked(now, asked);
    const std::uint64_t launched = budget.take(now, random() % 400);
    events.push_back({now, asked, launched});
    total += launched;
    if (launched == 0) continue;
    std::uint64_t asked_in_second = 0;
    std::uint64_t launched_in_second = 0;
    for (auto at = events.rbegin(); at != events.rend() && now - at->at <= kSecond; ++at) {
      asked_in_second += at->asked;
      launched_in_second += at->launched;
    }
    ASSERT_LE(static_cast<double>(launched_in_second),
              kShare * static_cast<double>(asked_in_second))
        << "at " << now;
  }
  EXPECT_GT(total, 1'000U) << "a budget that grants nothing holds, too";
}

TEST(SpeculationBudgetTest, GrantsNearlyTheWholeShareOfASteadyLoad) {
  SpeculationBudget budget(0.05);
  std::uint64_t launched = 0;
  for (std::uint64_t ms = 0; ms < 20'000; ms += 5) {
    budget.asked(kHour + ms * 1'000'000, 500);
    launched += budget.take(kHour + ms * 1'000'000, 500);
  }
  // 100,000 keys a second; a slot of ten is counted for launches only.
  EXPECT_GT(launched, 20 * 100'000 * 0.05 * 0.85);
  EXPECT_LE(launched, 20 * 100'000 * 0.05);
}

TEST(SpeculationBudgetTest, CountsNothingTwiceAmongThreads) {
  SpeculationBudget budget(0.5);
  std::array<std::uint64_t, 4> taken{};
  std::vector<std::thread> threads;
  for (std::size_t t = 0; t < taken.size(); ++t) {
    threads.emplace_back([&, t] {
      for (int i = 0; i < 5'000; ++i) {
        budget.asked(kHour, 2);
        taken[t] += budget.take(kHour, 3);
      }
    });
  }
  for (std::thread& thread : threads) thread.join();
  std::uint64_t total = budget.take(kHour, 1'000'000);
  for (const std::uint64_t part : taken) total += part;
  EXPECT_EQ(total, 20'000U);
}

// ---- a raised flight
// ------------------------------------------------------------------------------

class RaiseTest : public ::testing::Test {
 protected:
  FlightRef flight(const std::string& key, FetchPriority priority) {
    FlightRef made;
    flights_.join(0, key, std::hash<std::string>{}(key), {}, priority, nullptr, made);
    return made;
  }
  void push(FlightRef one) {
    std::vector<FlightRef> flights{std::move(one)};
    queue_->push(flights);
    EXPECT_TRUE(flights.empty());
  }
  std::string taken() {
    const auto batch = queue_->take(0);
    if (batch == nullptr) return "nothing";
    std::string keys;
    for (const std::string_view key : batch->groups().at(0).keys) keys += std::string(key) + " ";
    keys += std::to_string(static_cast<int>(batch->priority()));
    batch->fail(CellStatus::Error);
    return keys;
  }
  static StoreConfig config() {
    StoreConfig store;
    store.name = "store";
    store.queue_keys = 100;
    return store;
  }

  FlightTable flights_;
  std::size_t delivered_ = 0;
  std::shared_ptr<StoreQueue> queue_ = std::make_shared<StoreQueue>(
      config(), [](NamespaceIndex) { return std::string_view("pin"); },
      [this](std::vector<FlightRef>& flights, FetchAnswer*, CellStatus) {
        delivered_ += flights.size();
      });
};

TEST_F(RaiseTest, GoesWithTheLiveOnes) {
  push(flight("background", FetchPriority::Background));
  push(flight("s1", FetchPriority::Speculative));
  const FlightRef raised = flight("s2", FetchPriority::Speculative);
  push(raised);
  push(flight("s3", FetchPriority::Speculative));
  push(flight("l1", FetchPriority::Live));
  queue_->raise(raised, FetchPriority::Live);
  queue_->raise(raised, FetchPriority::Live);
  queue_->raise(raised, FetchPriority::Speculative);
  push(flight("l2", FetchPriority::Live));
  EXPECT_EQ(taken(), "l1 s2 l2 0");
  EXPECT_EQ(taken(), "s1 s3 1") << "each once";
  EXPECT_EQ(taken(), "background 2");
  EXPECT_EQ(taken(), "nothing");
  EXPECT_EQ(delivered_, 6U);
}

TEST_F(RaiseTest, BeforeItIsPushedOrAfterItWasTaken) {
  const FlightRef early = flight("early", FetchPriority::Background);
  queue_->raise(early, FetchPriority::Live);
  const FlightRef late = flight("late", FetchPriority::Speculative);
  push(late);
  push(early);
  EXPECT_EQ(taken(), "early 0");
  EXPECT_EQ(taken(), "late 1");
  queue_->raise(late, FetchPriority::Live);
  EXPECT_EQ(taken(), "nothing");
}

// The lines stay as short as the queue's limit, however many are raised past one that waits.
TEST_F(RaiseTest, StaleEntriesDoNotPileUp) {
  push(flight("waits", FetchPriority::Speculative));
  std::vector<std::weak_ptr<Flight>> gone;
  for (int i = 0; i < 2'000; ++i) {
    const std::string key = "k" + std::to_string(i);
    const FlightRef raised = flight(key, FetchPriority::Speculative);
    push(raised);
    queue_->raise(raised, FetchPriority::Live);
    EXPECT_EQ(taken(), key + " 0");
    std::vector<Waiter> nobody;
    flights_.end(raised, nobody);
    gone.push_back(raised);
  }
  std::size_t kept = 0;
  for (const auto& flight : gone) kept += flight.expired() ? 0 : 1;
  EXPECT_LE(kept, 300U);
  EXPECT_EQ(taken(), "waits 1");
  EXPECT_EQ(taken(), "nothing");
}

TEST_F(RaiseTest, StopEndsARaisedFlightToo) {
  const FlightRef raised = flight("k", FetchPriority::Speculative);
  push(raised);
  queue_->raise(raised, FetchPriority::Live);
  queue_->stop();
  EXPECT_GE(delivered_, 1U);
  EXPECT_EQ(taken(), "nothing");
}

}  // namespace
}  // namespace fc::testing

#include "comm/run/expert_seats.h"

#include <gtest/gtest.h>

namespace penstock {
namespace {

ModelConfig small_model() {
  ModelConfig model;
  model.num_hidden_layers = 4;
  model.first_k_dense_replace = 2;
  model.n_routed_experts = 4;
  return model;
}

TEST(ExpertSeatsTest, LayersWithExpertsIncludeTheBlockOfMultiTokenPrediction) {
  ModelConfig model = small_model();
  EXPECT_EQ(expert_layers(model), (std::vector<int64_t>{2, 3}));
  model.num_nextn_predict_layers = 1;
  EXPECT_EQ(expert_layers(model), (std::vector<int64_t>{2, 3, 4}));
  model.first_k_dense_replace = 4;
  EXPECT_EQ(expert_layers(model), (std::vector<int64_t>{4}));
}

TEST(ExpertSeatsTest, ExpertsSitInOrderWhereNothingIsSaid) {
  const std::vector<int32_t> in_order = {0, 1, 2, 3};
  EXPECT_EQ(experts_by_seat({{{3, {3, 2, 1, 0}}}}, 2, 4), in_order);
  EXPECT_EQ(seats_by_expert({}, 2, 4), in_order);
}

TEST(ExpertSeatsTest, SeatsByExpertTurnExpertsBySeatAround) {
  const ExpertSeats seats = {{{2, {3, 0, 1, 2}}}};
  EXPECT_EQ(experts_by_seat(seats, 2, 4), (std::vector<int32_t>{3, 0, 1, 2}));
  EXPECT_EQ(seats_by_expert(seats, 2, 4), (std::vector<int32_t>{1, 2, 3, 0}));
}

TEST(ExpertSeatsTest, RefusesLayersAndSeatsThatTheModelDoesNotHave) {
  const ModelConfig model = small_model();
  EXPECT_TRUE(check_expert_seats({{{2, {3, 0, 2, 1}}, {3, {0, 1, 2, 3}}}}, model).ok());
  EXPECT_TRUE(check_expert_seats({}, model).ok());
  const auto refused = [&](const ExpertSeats& seats, const std::string& layer) {
    const Status status = check_expert_seats(seats, model);
    return status.code() == Code::kInvalidArgument &&
           status.message().find("layer " + layer) != std::string::npos;
  };
  EXPECT_TRUE(refused({{{1, {0, 1, 2, 3}}}}, "1"));  // dense
  EXPECT_TRUE(refused({{{4, {0, 1, 2, 3}}}}, "4"));  // no multi-token prediction
  EXPECT_TRUE(refused({{{-1, {0, 1, 2, 3}}}}, "-1"));
  EXPECT_TRUE(refused({{{2, {0, 1, 2}}}}, "2"));
  EXPECT_TRUE(refused({{{2, {0, 1, 2, 3, 4}}}}, "2"));
  EXPECT_TRUE(refused({{{2, {0, 1, 2, 2}}}}, "2"));
  EXPECT_TRUE(refused({{{2, {0, 1, 2, 4}}}}, "2"));
  EXPECT_TRUE(refused({{{2, {0, 1, 2, -1}}}}, "2"));
}

TEST(ExpertSeatsTest, HugeModelsKeepTheirExpertsWhereTheyAre) {
  ModelConfig model = small_model();
  EXPECT_TRUE(experts_can_move(model));
  model.num_hidden_layers = 1 << 16;
  model.n_routed_experts = 1 << 16;
  EXPECT_FALSE(experts_can_move(model));
}

}  // namespace
}  // namespace penstock

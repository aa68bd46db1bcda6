using System;
using System.Collections.Generic;
using System.Linq;
using System.Net;
using Xunit;

namespace TcpProxy.Tests;

/// <summary>How servers are picked, and how they go down and come back; the time is the test's.</summary>
public sealed class BalancerTests
{
    private const int Picks = 100_000;
    private static readonly CloseReason Ill = CloseReason.OfServer("ill");

    [Theory]
    [InlineData("leastconn")]
    [InlineData("roundrobin")]
    [InlineData("random")]
    [InlineData("source")]
    public void Connections_spread_by_weight(string policy)
    {
        int[] weights = [1, 2, 3, 10, 4, 1];
        Balancer balancer = Make(policy, weights.Select((weight, i) => $"10.0.0.{i}:80 weight={weight}"));
        Random random = new(1);
        for (int i = 0; i < Picks; i++)
        {
            Take(balancer, Client(random));
        }

        for (int i = 0; i < weights.Length; i++)
        {
            double share = balancer.Servers[i].Active / (double)Picks;
            Assert.InRange(share, (weights[i] / 21.0) - 0.01, (weights[i] / 21.0) + 0.01);
        }
    }

    [Theory]
    [InlineData("leastconn")]
    [InlineData("roundrobin")]
    [InlineData("random")]
    public void So_do_connections_that_end_at_once(string policy)
    {
        Balancer balancer = Make(policy, ["a:1 weight=3", "b:1", "c:1 weight=6"]);
        Dictionary<string, int> picks = [];
        for (int i = 0; i < Picks; i++)
        {
            Server server = Take(balancer)!;
            picks[server.Title] = picks.GetValueOrDefault(server.Title) + 1;
            server.Leave();
        }

        Assert.InRange(picks["a:1"], Picks * 0.29, Picks * 0.31);
        Assert.InRange(picks["b:1"], Picks * 0.09, Picks * 0.11);
    }

    [Fact]
    public void The_better_of_two_draws_keeps_servers_far_nearer_to_each_other_than_one()
    {
        Balancer balancer = Make("random", Enumerable.Range(0, 10).Select(i => $"10.0.0.{i}:80"));
        for (int i = 0; i < Picks; i++)
        {
            Take(balancer);
        }

        int most = balancer.Servers.Max(server => server.Active); // one draw: 10 servers lie hundreds apart
        Assert.InRange(most - balancer.Servers.Min(server => server.Active), 0, 40);
    }

    [Fact]
    public void Round_robin_is_smooth_in_the_order_of_nginx()
    {
        Balancer balancer = Make("roundrobin", ["a:1 weight=5", "b:1", "c:1"]);
        Assert.Equal("aabacaaaabacaa", string.Concat(Enumerable.Range(0, 14).Select(_ => Take(balancer)!.Title[..1])));
    }

    [Fact]
    public void The_one_with_the_fewest_connections_is_next_and_ties_take_turns()
    {
        Balancer balancer = Make("leastconn", ["a:1", "b:1", "c:1"]);
        for (int i = 1; i <= 100; i++)
        {
            Titles(balancer, 3);
            Assert.All(balancer.Servers, server => Assert.Equal(i, server.Active));
        }

        balancer.Servers[1].Leave();
        balancer.Servers[1].Leave();
        Assert.Equal("b:1", Take(balancer)!.Title);
        Assert.Equal("b:1", Take(balancer)!.Title);
    }

    [Fact]
    public void Under_first_the_next_one_gets_what_the_first_has_no_room_for()
    {
        Balancer balancer = Make("first", ["a:1 max-connections=2", "b:1 max-connections=1"]);
        Assert.Equal(["a:1", "a:1", "b:1", null], Enumerable.Range(0, 4).Select(_ => Take(balancer)?.Title));
        balancer.Servers[0].Leave();
        Assert.Equal("a:1", Take(balancer)!.Title);
    }

    [Fact]
    public void Removing_one_of_ten_moves_few_clients_of_the_others_and_adding_one_too()
    {
        string[] ten = [.. Enumerable.Range(0, 10).Select(i => $"10.0.0.{i}:80")];
        Dictionary<ulong, string> before = Choices(Make("source", ten));
        foreach (string removed in ten)
        {
            Dictionary<ulong, string> after = Choices(Make("source", ten.Where(server => server != removed)));
            List<ulong> others = [.. before.Where(pair => pair.Value != removed).Select(pair => pair.Key)];
            double moved = others.Count(client => before[client] != after[client]) / (double)others.Count;
            Assert.True(moved <= 0.12, $"{moved:P1} of the other servers' clients moved when {removed} was removed");
            Assert.DoesNotContain(removed, after.Values);
        }
    }

    [Fact]
    public void A_server_that_is_down_moves_no_client_of_the_others_and_its_own_spread()
    {
        string[] ten = [.. Enumerable.Range(0, 10).Select(i => $"10.0.0.{i}:80")];
        Balancer balancer = Make("source", ten);
        Dictionary<ulong, string> before = Choices(balancer);
        balancer.Checked(balancer.Servers[4], Ill, 1000);
        Dictionary<ulong, string> after = Choices(balancer);
        List<ulong> own = [.. before.Where(pair => pair.Value == ten[4]).Select(pair => pair.Key)];
        Assert.All(before.Where(pair => pair.Value != ten[4]), pair => Assert.Equal(pair.Value, after[pair.Key]));
        foreach (IGrouping<string, ulong> group in own.GroupBy(client => after[client]))
        {
            Assert.NotEqual(ten[4], group.Key);
            Assert.InRange(group.Count() / (double)own.Count, 0.08, 0.15);
        }
    }

    [Fact]
    public void The_source_decides_and_not_the_order_nor_the_process()
    {
        string[] servers = ["a:1 weight=3", "b:1", "10.0.0.7:80 weight=2", "unix:/x", "d:1"];
        Dictionary<ulong, string> choices = Choices(Make("source", servers));
        Assert.Equal(choices, Choices(Make("source", servers.Reverse())));
        Assert.Equal(choices, Choices(Make("source", ["d:1", .. servers[..4]])));
        // written down: a later version must not move the clients of this one either
        string some = string.Join(' ', Enumerable.Range(0, 8).Select(i =>
            Take(Make("source", servers), Maglev.Hash(new IPEndPoint(new IPAddress([10, 1, 2, (byte)i]), i)))!.Title));
        Assert.Equal(Pinned, some);
    }

    private const string Pinned = "unix:/x 10.0.0.7:80 a:1 a:1 a:1 a:1 a:1 a:1";

    [Fact]
    public void An_address_is_the_same_client_however_it_is_written_and_from_any_port()
    {
        ulong hash = Maglev.Hash(new IPEndPoint(IPAddress.Parse("10.1.2.3"), 1));
        Assert.Equal(hash, Maglev.Hash(new IPEndPoint(IPAddress.Parse("::ffff:10.1.2.3"), 2)));
        Assert.NotEqual(hash, Maglev.Hash(new IPEndPoint(IPAddress.Parse("10.1.2.4"), 1)));
        Assert.NotEqual(Maglev.Hash(new IPEndPoint(IPAddress.Parse("2001:db8::1"), 1)),
            Maglev.Hash(new IPEndPoint(IPAddress.Parse("2001:db8::2"), 1)));
        Assert.Equal(Maglev.Hash((EndPoint?)null), Maglev.Hash(new System.Net.Sockets.UnixDomainSocketEndPoint("/a")));
    }

    [Theory]
    [InlineData(1, 1, 1)]
    [InlineData(256, 1, 1)]
    [InlineData(1, 2, 3)]
    public void The_table_has_places_by_weight(params int[] weights)
    {
        ArgumentNullException.ThrowIfNull(weights);
        ushort[] table = Maglev.Table([.. weights.Select((_, i) => $"server{i}")], weights);
        for (int i = 0; i < weights.Length; i++)
        {
            double expected = table.Length * (double)weights[i] / weights.Sum();
            Assert.InRange(table.Count(server => server == i), expected * 0.99, expected * 1.01);
        }
    }

    [Fact]
    public void A_drained_server_is_never_picked()
    {
        foreach (string policy in (string[])["leastconn", "roundrobin", "random", "source", "first"])
        {
            Balancer balancer = Make(policy, ["a:1 weight=0", "b:1", "c:1"]);
            Choices(balancer, 1000);
            Assert.Equal(0, balancer.Servers[0].Active);
            Assert.Null(Take(Make(policy, ["a:1 weight=0", "b:1 weight=0"])));
        }

        Assert.Null(Take(Make("leastconn", ["a:1 weight=0"])));
    }

    [Fact]
    public void Backups_serve_when_all_others_are_down_or_full_and_share_then()
    {
        Balancer balancer = Make("roundrobin", ["a:1", "b:1 max-connections=1", "c:1 backup", "d:1 backup"]);
        Assert.DoesNotContain("c:1", Titles(balancer, 20));
        balancer.Checked(balancer.Servers[0], Ill, 1000);
        Assert.Equal(["c:1", "d:1", "c:1", "d:1"], Titles(balancer, 4)); // b is full
        balancer.Servers[1].Leave();
        Assert.Equal(["b:1", "c:1"], Titles(balancer, 2).Order());
    }

    [Fact]
    public void Where_all_are_down_each_is_tried_and_a_full_one_that_is_up_is_waited_for()
    {
        Balancer balancer = Make("roundrobin", ["a:1", "b:1", "c:1 max-connections=1"]);
        foreach (Server server in balancer.Servers)
        {
            balancer.Checked(server, Ill, 1000);
        }

        Assert.Equal(["a:1", "b:1", "c:1"], Titles(balancer, 3).Order());
        balancer.Checked(balancer.Servers[2], null, 1000); // c is up and full
        Assert.Null(balancer.TryTake(0, null, 1000, out bool isFull));
        Assert.True(isFull);
    }

    [Fact]
    public void Those_tried_are_not_picked_again()
    {
        foreach (string policy in (string[])["leastconn", "roundrobin", "random", "source", "first"])
        {
            Balancer balancer = Make(policy, ["a:1", "b:1", "c:1"]);
            List<Server> tried = [];
            for (int i = 0; i < 3; i++)
            {
                tried.Add(balancer.TryTake(1, tried, 1000, out _)!);
            }

            Assert.Equal(3, tried.Distinct().Count());
            Assert.Null(balancer.TryTake(1, tried, 1000, out bool isFull));
            Assert.False(isFull);
        }
    }

    // ---- down and up

    [Fact]
    public void Failures_in_time_mark_a_server_and_one_client_tries_it_again()
    {
        Balancer balancer = Make("first", ["a:1", "b:1"], new PoolSettings { MaxFails = 3, FailTimeout = Seconds(10) });
        Server a = balancer.Servers[0];
        Fail(a, 1_000);
        Fail(a, 2_000);
        Assert.Equal("a:1", TitleAt(2_000));
        Fail(a, 13_000); // too late to count with the others: the first of a new row
        Fail(a, 14_000);
        Assert.Equal("a:1", TitleAt(14_000));
        Fail(a, 15_000);
        Assert.Equal("b:1", TitleAt(15_000));
        Assert.Equal("b:1", TitleAt(24_999));
        Assert.Equal("a:1", TitleAt(25_000)); // the one that tries
        Assert.Equal("b:1", TitleAt(25_001));
        Fail(a, 26_000); // one failure is enough now
        Assert.Equal("b:1", TitleAt(35_999));
        Assert.Equal("a:1", TitleAt(36_000));
        balancer.Dialled(a, null, 36_001);
        Assert.Equal("a:1", TitleAt(36_002));
        Fail(a, 36_003);
        Assert.Equal("a:1", TitleAt(36_004)); // it starts with a clean sheet

        string TitleAt(long now) => balancer.TryTake(0, null, now, out _)!.Title;
    }

    [Fact]
    public void A_try_that_fails_for_reasons_of_ours_is_the_next_clients()
    {
        Balancer balancer = Make("first", ["a:1", "b:1"], new PoolSettings { MaxFails = 1, FailTimeout = Seconds(10) });
        Server a = balancer.Servers[0];
        Fail(a, 1_000);
        Assert.Same(a, balancer.TryTake(0, null, 11_000, out _));
        Assert.NotSame(a, balancer.TryTake(0, null, 11_001, out _)); // while that one tries
        balancer.Dialled(a, CloseReason.OutOfDescriptors, 11_002);
        Assert.Same(a, balancer.TryTake(0, null, 11_003, out _));
        balancer.Dialled(a, null, 11_004);
        Assert.Same(a, balancer.TryTake(0, null, 11_005, out _));
    }

    [Fact]
    public void A_lone_server_and_failures_that_are_ours_or_do_not_count_mark_nothing()
    {
        Balancer lone = Make("leastconn", ["a:1"], new PoolSettings { MaxFails = 1, FailTimeout = Seconds(10) });
        Fail(lone.Servers[0], 1000);
        Assert.True(lone.Servers[0].IsUp(1001));
        Balancer off = Make("leastconn", ["a:1", "b:1"], new PoolSettings { MaxFails = 0, FailTimeout = Seconds(10) });
        Balancer ours = Make("leastconn", ["a:1", "b:1"], new PoolSettings { MaxFails = 1, FailTimeout = Seconds(10) });
        for (int i = 0; i < 10; i++)
        {
            Fail(off.Servers[0], 1000);
            ours.Dialled(ours.Servers[0], CloseReason.OutOfDescriptors, 1000);
        }

        Assert.True(off.Servers[0].IsUp(1001));
        Assert.True(ours.Servers[0].IsUp(1001));
    }

    [Fact]
    public void Checks_in_a_row_take_a_server_down_and_up()
    {
        Balancer balancer = Make("first", ["a:1", "b:1"], new PoolSettings { CheckFall = 3, CheckRise = 2 });
        string log = "";
        foreach (char check in "--+---+-++-")
        {
            balancer.Checked(balancer.Servers[0], check == '-' ? Ill : null, 1000);
            log += balancer.Servers[0].IsUp(1000) ? 'u' : 'd';
        }

        Assert.Equal("uuuuuddd" + "d" + "u" + "u", log);
    }

    [Fact]
    public void A_check_that_was_on_its_way_when_a_reload_ended_them_takes_no_server_down()
    {
        PoolSettings settings = new();
        Balancer balancer = Make("first", ["a:1", "b:1"], settings);
        settings.Check = TimeSpan.Zero;
        balancer.Checked(balancer.Servers[0], Ill, 1000);
        Assert.True(balancer.Servers[0].IsUp(1000));
    }

    [Fact]
    public void A_server_that_checks_bring_back_is_not_left_marked_by_connects_that_failed_before()
    {
        Balancer balancer = Make("first", ["a:1", "b:1"], new PoolSettings { MaxFails = 1, FailTimeout = Seconds(10) });
        Server server = balancer.Servers[0];
        Fail(server, 1000);
        balancer.Checked(server, Ill, 1000);
        Assert.False(server.IsUp(1500));
        balancer.Checked(server, null, 1500);
        Assert.True(server.IsUp(1500));
    }

    [Theory]
    [InlineData("leastconn")]
    [InlineData("roundrobin")]
    [InlineData("random")]
    [InlineData("source")]
    public void A_server_that_is_back_gets_its_share_slowly(string policy)
    {
        Balancer balancer = Make(policy, ["a:1 slow-start=100s", "b:1 slow-start=100s"],
            new PoolSettings { MaxFails = 1, FailTimeout = Seconds(10) });
        Server a = balancer.Servers[0];
        Assert.InRange(ShareOf(a, 1_000), 0.45, 0.55); // none at the start of the process
        Fail(a, 1_000);
        balancer.Dialled(a, null, 20_000);
        Assert.InRange(ShareOf(a, 20_000), 0.001, 0.02);
        Assert.InRange(ShareOf(a, 70_000), 0.22, 0.37);
        Assert.InRange(ShareOf(a, 120_000), 0.45, 0.55);
        Assert.Equal(0, a.BackSince);
        balancer.Checked(a, Ill, 200_000);
        balancer.Checked(a, null, 200_000);
        Assert.InRange(ShareOf(a, 200_000), 0.001, 0.02);

        double ShareOf(Server server, long now)
        {
            Random random = new(1);
            for (int i = 0; i < 10_000; i++)
            {
                balancer.TryTake(Client(random), null, now, out _);
            }

            double share = server.Active / 10_000.0;
            Array.ForEach(balancer.Servers, s => s.Active = 0);
            return share;
        }
    }

    [Fact]
    public void When_all_come_back_at_once_each_has_its_share_at_once()
    {
        Balancer balancer = Make("source", ["a:1", "b:1"]);
        Dictionary<ulong, string> before = Choices(balancer);
        foreach (Server server in balancer.Servers)
        {
            balancer.Checked(server, Ill, 900);
            balancer.Checked(server, null, 999);
        }

        Assert.Equal(before, Choices(balancer));
    }

    [Fact]
    public void Each_port_of_a_range_has_servers_of_its_own()
    {
        Balancer second = Make("leastconn", ["10.0.0.1:10-12", "[::1]:99", "9001"], portIndex: 1);
        Assert.Equal(["10.0.0.1:11", "[::1]:99", "localhost:9001"], second.Servers.Select(server => server.Title));
    }

    private static TimeSpan Seconds(int seconds) => TimeSpan.FromSeconds(seconds);

    private static void Fail(Server server, long now) => server.Balancer.Dialled(server, CloseReason.ConnectTimeout, now);

    private static ulong Client(Random random) =>
        Maglev.Hash(new IPEndPoint(new IPAddress((uint)random.Next()), random.Next(65536)));

    private static Server? Take(Balancer balancer, ulong client = 0) => balancer.TryTake(client, null, 1000, out _);

    private static IEnumerable<string> Titles(Balancer balancer, int count) =>
        [.. Enumerable.Range(0, count).Select(_ => Take(balancer)!.Title)];

    private static Dictionary<ulong, string> Choices(Balancer balancer, int clients = 20_000)
    {
        Random random = new(7);
        Dictionary<ulong, string> choices = [];
        for (int i = 0; i < clients; i++)
        {
            ulong client = Client(random);
            choices[client] = Take(balancer, client)!.Title;
        }

        return choices;
    }

    private static Balancer Make(
        string policy, IEnumerable<string> servers, PoolSettings? settings = null, int portIndex = 0)
    {
        settings ??= new PoolSettings();
        settings.Check = Seconds(1);
        settings.Policy = Enum.Parse<Policy>(policy == "leastconn" ? "LeastConnections" : policy, ignoreCase: true);
        Log log = new(new LogSettings { Format = LogFormat.Off });
        List<UpstreamSettings> parsed = [.. servers.Select(text => UpstreamSettings.Parse( // a:1 is a name for what needs no look-up
            char.IsLetter(text[0]) && text[1] == ':' ? $"10.0.0.{(int)text[0]}{text[1..]} name={text.Split(' ')[0]}" : text))];
        Balancer balancer = new([.. parsed], new Resolver?[parsed.Count], portIndex, settings, null, new RouteStats(""), log);
        balancer.Update();
        return balancer;
    }
}

using System;
using System.Buffers.Binary;
using System.IO;
using System.Net;
using System.Threading.Tasks;
using Xunit;

namespace TcpProxy.Tests;

public sealed class StaticBinaryTests : EndToEndTest
{
    protected override string? Native => "it is not the static binary";

    [Fact(Timeout = Quick)]
    public void The_binary_asks_for_no_interpreter_and_no_library()
    {
        const uint Dynamic = 2;
        const uint Interpreter = 3;
        byte[] elf = File.ReadAllBytes(ProxyProcess.Binary);
        Assert.Equal([0x7F, (byte)'E', (byte)'L', (byte)'F', 2, 1], elf[..6]);
        ulong table = BinaryPrimitives.ReadUInt64LittleEndian(elf.AsSpan(32));
        int size = BinaryPrimitives.ReadUInt16LittleEndian(elf.AsSpan(54));
        int count = BinaryPrimitives.ReadUInt16LittleEndian(elf.AsSpan(56));
        for (int i = 0; i < count; i++)
        {
            ReadOnlySpan<byte> header = elf.AsSpan((int)table + (i * size), size);
            uint type = BinaryPrimitives.ReadUInt32LittleEndian(header);
            Assert.True(type != Interpreter, "the binary is dynamic: it names an interpreter");
            if (type == Dynamic)
            {
                Assert.False(NeedsLibrary(elf, header), "the binary is dynamic: it needs a library");
            }
        }
    }

    [Fact(Timeout = Quick)]
    public async Task In_an_empty_chroot_it_relays_to_a_name_of_the_hosts_file() =>
        await RelayInChroot("127.0.0.1 server.example\n", "");

    [Fact(Timeout = Quick)]
    public async Task In_an_empty_chroot_it_relays_to_a_name_of_the_name_server()
    {
        Names names = await Names.Hosts(Given);
        names.Answer(IPAddress.Loopback);
        await RelayInChroot("", names.Resolver);
        Assert.True(names.Asked > 0, "the name server was not asked");
    }

    [Fact(Timeout = Quick)]
    public async Task Nothing_connected_costs_little_memory()
    {
        ProxyProcess proxy = await Given.Proxy("127.0.0.1:0", "127.0.0.1:1");
        await proxy.Line("listening");
        Assert.True(proxy.Resident <= 4 << 20, $"{proxy.Resident} bytes resident");
    }

    [Fact(Timeout = Quick)]
    public async Task The_binary_for_arm64_relays_as_well()
    {
        string qemu = Tool.Need("qemu-aarch64-static", "qemu-user-static");
        string dist = Path.Combine(Path.GetDirectoryName(ProxyProcess.Binary)!, "dist");
        string[] made = Directory.Exists(dist) ? Directory.GetFiles(dist, "tcpproxy-*-linux-arm64") : [];
        Assert.SkipWhen(made.Length == 0, "no binary for arm64: apt-get install gcc-aarch64-linux-gnu "
            + "libc6-dev-arm64-cross clang lld, then ./build.sh dist");
        Upstream upstream = Given.Echo();
        Launch launch = new() { Before = [qemu], Binary = made[0] };
        ProxyProcess proxy = await Given.Proxy(launch, "127.0.0.1:0", upstream.Address);
        await Converse(proxy, upstream);
    }

    private async Task RelayInChroot(string hosts, string resolver)
    {
        Tool.NeedRoot("chroot");
        string chroot = Tool.Need("chroot", "coreutils");
        string root = Directory.CreateDirectory(Given.Path("root")).FullName;
        Directory.CreateDirectory(Path.Combine(root, "etc"));
        File.WriteAllText(Path.Combine(root, "etc", "hosts"), hosts);
        File.WriteAllText(Path.Combine(root, "etc", "resolv.conf"), resolver);
        File.Copy(ProxyProcess.Binary, Path.Combine(root, "tcpproxy"));
        Upstream upstream = Given.Echo();
        Launch launch = new()
        {
            Before = [chroot, root],
            Binary = "/tcpproxy",
            PortFile = "/ports",
            Root = root,
        };
        ProxyProcess proxy = await Given.Proxy(launch, "127.0.0.1:0", $"server.example:{upstream.Port}");
        await Converse(proxy, upstream);
    }

    private async Task Converse(ProxyProcess proxy, Upstream upstream)
    {
        Peer client = await Given.Client(proxy);
        await client.Ask("hello");
        client.Finish();
        await client.ExpectEnd();
        Assert.Equal(upstream.Address, (await proxy.Connection(client))["server"]);
    }

    private static bool NeedsLibrary(byte[] elf, ReadOnlySpan<byte> header)
    {
        const ulong Needed = 1;
        int offset = (int)BinaryPrimitives.ReadUInt64LittleEndian(header[8..]);
        int size = (int)BinaryPrimitives.ReadUInt64LittleEndian(header[32..]);
        for (int at = offset; at < offset + size; at += 16)
        {
            if (BinaryPrimitives.ReadUInt64LittleEndian(elf.AsSpan(at)) == Needed)
            {
                return true;
            }
        }

        return false;
    }
}
